"""Parts of the work as other libraries and PyTorch offer them: the top-k of both sides, one exact KL divergence.

Each is what its users call today; for the divergence they form the log-probabilities themselves. A library that is not
installed is left out, and the run says so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

K = 16


def _torch_topk(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    sides = {"student": student_logits, "teacher": teacher_logits}
    return {side: logits.topk(K).values for side, logits in sides.items()}


def _flashinfer_topk(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    import flashinfer  # type: ignore[import-not-found, unused-ignore]

    sides = {"student": student_logits, "teacher": teacher_logits}
    values = {side: flashinfer.top_k(logits.flatten(0, -2), K, sorted=True)[0] for side, logits in sides.items()}
    return {side: one.view(*student_logits.shape[:-1], K) for side, one in values.items()}


def _torch_kl(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    logp, logq = _log_probabilities(student_logits, teacher_logits)
    return {"mean_kl": torch.nn.functional.kl_div(logq, logp, reduction="batchmean", log_target=True)}


def _liger_kl(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    from liger_kernel.transformers import LigerKLDIVLoss  # type: ignore[import-not-found, unused-ignore]

    logp, logq = _log_probabilities(student_logits, teacher_logits)
    return {"mean_kl": LigerKLDIVLoss(reduction="batchmean", log_target=True)(logq, logp)}


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> list[Tensor]:
    return [logits.flatten(0, -2).log_softmax(-1, dtype=torch.float32) for logits in (student_logits, teacher_logits)]


# part: who -> function; PyTorch's own is what the others' answers are compared with
PARTS: dict[str, dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]]] = {
    "topk": {"eager": _torch_topk, "flashinfer": _flashinfer_topk},
    "kl": {"eager": _torch_kl, "liger": _liger_kl},
}
MODULES = {"flashinfer": "flashinfer", "liger": "liger_kernel"}


def installed(impl: str) -> bool:
    return impl not in MODULES or find_spec(MODULES[impl]) is not None
