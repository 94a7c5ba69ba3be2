"""Every operator once: its inputs, the same computation in eager PyTorch, and what its kernels do.

The rest of bench takes operators from the table at the end and names none. The eager functions are the peers: the same
computations as one writes them in PyTorch today, without this library; autograd differentiates the losses.

`logprob_dtype` is the dtype in which log-probabilities are formed. For half-precision logits there are two habits:
float32 (what trainers do when they care about a difference of two log-probabilities), and None, the logits' own dtype,
which is faster and good to two digits. Both are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

W_DROP, W_BASE, THRESHOLD, EPS = 0.01, 0.5, 0.7, 1e-8
CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.2, 3.0
CHUNKS, CHECKPOINTED_CHUNKS = 4, 16  # of the positions; a trainer's hold 256 to 4096 of tens of thousands


def overlap_of(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    matches = student_topk_ids.unsqueeze(-1) == teacher_topk_ids.unsqueeze(-2)
    return matches.any(-1).float().mean(-1)


def reliability_from_drift(drift: Tensor) -> dict[str, Tensor]:
    drift_count = drift.cumsum(-1)
    reliability = (1 - W_DROP * drift_count).clamp(0, 1)
    return {
        "drift_count": drift_count,
        "reliability": reliability,
        "weight": reliability + W_BASE,
        "effective_length": (reliability > EPS).sum(-1),
    }


def reliability_from_topk(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> dict[str, Tensor]:
    overlap = overlap_of(student_topk_ids, teacher_topk_ids)
    drift = overlap < THRESHOLD
    return {"overlap": overlap, "drift": drift, **reliability_from_drift(drift)}


def reliability(
    student_logits: Tensor, teacher_logits: Tensor, k: int = 16, logprob_dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    topk_ids = student_logits.topk(k).indices
    scan = reliability_from_topk(topk_ids, teacher_logits.topk(k).indices)
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype).gather(-1, topk_ids)
    logq = teacher_logits.log_softmax(-1, dtype=logprob_dtype).gather(-1, topk_ids)
    rewards = scan["weight"].unsqueeze(-1) * logp.softmax(-1) * (logq - logp)
    return {**scan, "topk_ids": topk_ids, "rewards": rewards}


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    k: int = 16,
    logprob_dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    student_top, student_topk_ids = student_logits.topk(k)
    teacher_top, teacher_topk_ids = teacher_logits.topk(k)
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype)
    logq = teacher_logits.log_softmax(-1, dtype=logprob_dtype)
    p, q = logp.exp(), logq.exp()
    token = token_ids.unsqueeze(-1)
    return {
        "student_topk_ids": student_topk_ids,
        "student_topk_logprobs": logp.gather(-1, student_topk_ids),
        "teacher_topk_ids": teacher_topk_ids,
        "teacher_topk_logprobs": logq.gather(-1, teacher_topk_ids),
        "teacher_on_student_logprobs": logq.gather(-1, student_topk_ids),
        "student_on_teacher_logprobs": logp.gather(-1, teacher_topk_ids),
        "overlap": overlap_of(student_topk_ids, teacher_topk_ids),
        "student_lse": student_top[..., 0] - logp.amax(-1),  # logsumexp would be a second, slower pass
        "teacher_lse": teacher_top[..., 0] - logq.amax(-1),
        "student_entropy": -(p * logp).sum(-1),
        "teacher_entropy": -(q * logq).sum(-1),
        "reverse_kl": (p * (logp - logq)).sum(-1),
        "forward_kl": (q * (logq - logp)).sum(-1),
        "student_token_logprob": logp.gather(-1, token).squeeze(-1),
        "teacher_token_logprob": logq.gather(-1, token).squeeze(-1),
    }


def topk_policy_loss(
    student_logits: Tensor, topk_ids: Tensor, advantages: Tensor, logprob_dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    logprobs = student_logits.log_softmax(-1, dtype=logprob_dtype).gather(-1, topk_ids)
    ratio = (logprobs - logprobs.detach()).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    losses = torch.where(advantages < 0, losses.minimum(-advantages * CLIP_DUAL), losses)
    return {"loss": losses.sum(-1)}


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, logprob_dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype)
    logq = teacher_logits.log_softmax(-1, dtype=logprob_dtype)
    return {"loss": weight * (logp.exp() * (logp - logq)).sum(-1)}


def topk_forward_kl(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    logprob_dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype)
    # Not of logp: in half precision two different logits may have the same.
    student_topk_ids = student_logits.topk(teacher_topk_ids.shape[-1]).indices
    return _forward_kl(logp.gather(-1, teacher_topk_ids), student_topk_ids, teacher_topk_ids, teacher_topk_logprobs)


def topk_forward_kl_chunked(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor
) -> dict[str, Tensor]:
    return _in_chunks(CHUNKS, _logprobs_of, student_logits, teacher_topk_ids, teacher_topk_logprobs)


def topk_forward_kl_checkpointed(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor
) -> dict[str, Tensor]:
    def again(logits: Tensor, ids: Tensor) -> Tensor:
        return checkpoint(_logprobs_of, logits, ids, use_reentrant=False)  # type: ignore[no-any-return]

    return _in_chunks(CHECKPOINTED_CHUNKS, again, student_logits, teacher_topk_ids, teacher_topk_logprobs)


def _in_chunks(
    chunks: int,
    logprobs_of: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
) -> dict[str, Tensor]:
    student_topk_ids = student_logits.topk(teacher_topk_ids.shape[-1]).indices
    pieces = zip(*(x.flatten(0, -2).chunk(chunks) for x in (student_logits, teacher_topk_ids)), strict=True)
    logprobs = torch.cat([logprobs_of(logits, ids) for logits, ids in pieces]).view_as(teacher_topk_logprobs)
    return _forward_kl(logprobs, student_topk_ids, teacher_topk_ids, teacher_topk_logprobs)


def _logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def _forward_kl(
    student_logprobs: Tensor, student_topk_ids: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor
) -> dict[str, Tensor]:
    """The loss from log-probabilities of the teacher's candidates, and what trainers log beside it."""
    terms = teacher_topk_logprobs.exp() * (teacher_topk_logprobs - student_logprobs)
    both = student_logprobs, teacher_topk_logprobs
    rest_p, rest_q = ((1 - x.float().exp().sum(-1)).clamp(min=2**-24) for x in both)
    shared = (teacher_topk_ids.unsqueeze(-1) == student_topk_ids.unsqueeze(-2)).any(-1)
    return {
        "loss": terms.sum(-1) + rest_q * (rest_q.log() - rest_p.log()),
        "student_mass": student_logprobs.detach().exp().sum(-1),
        "teacher_mass": teacher_topk_logprobs.exp().sum(-1),
        "overlap": overlap_of(student_topk_ids, teacher_topk_ids),
        "overlap_token_advantage": -(terms.detach() * shared).sum(-1) / shared.sum(-1).clamp(min=1),
        "student_topk_ids": student_topk_ids,
    }


# --- the table ----------------------------------------------------------------------------------------------------

Eager = Callable[..., dict[str, Tensor]]
LOGITS = ("student_logits", "teacher_logits")


@dataclass(frozen=True)
class Operator:
    """What there is to know of an operator for measuring it and its kernels."""

    eager: Eager
    reads: tuple[str, ...]  # the large inputs, by parameter
    given: tuple[str, ...] = ()  # what else it is given; bench/measure/inputs.py makes it by these names
    has_k: bool = True  # k is a parameter, or the number of candidates
    longer_k: bool = False  # also measured at k=64 and k=256
    is_loss: bool = False
    usual: Mapping[str, Eager] = field(default_factory=dict)  # what else is usual in its place
    selections: int = 0  # rows whose k largest logits its kernels look for
    forward: str = ""  # the stem of its forward kernel (bench/count/machine_code.py), if that is not its name
    backward: str = ""  # the stem of its backward kernel
    linear: str = ""  # what linear_opd_loss calls it

    @property
    def of_logits(self) -> bool:
        return self.reads[0] in LOGITS

    @property
    def takes_k(self) -> bool:
        return self.of_logits and not self.is_loss

    @property
    def shape_in_words(self) -> str:
        """Of an operator without logits, for a table."""
        return "drift `[64, 12288]`" if self.reads == ("drift",) else "ids `[64, 12288, 16]`"


OPERATORS = {
    "reliability": Operator(reliability, LOGITS, longer_k=True, selections=2),
    "token_stats": Operator(token_stats, LOGITS, ("token_ids",), selections=2),
    "reliability_from_topk": Operator(reliability_from_topk, ("student_topk_ids", "teacher_topk_ids")),
    "reliability_from_drift": Operator(reliability_from_drift, ("drift",), has_k=False),
    "topk_policy_loss": Operator(
        topk_policy_loss, LOGITS[:1], ("topk_ids", "advantages"), is_loss=True,
        forward="row_stats", backward="logprobs_backward", linear="topk_policy",
    ),
    "topk_forward_kl": Operator(
        topk_forward_kl, LOGITS[:1], ("teacher_topk_ids", "teacher_topk_logprobs"), is_loss=True,
        usual={"chunked": topk_forward_kl_chunked, "checkpointed": topk_forward_kl_checkpointed}, selections=1,
        forward="row_stats_true", backward="logprobs_backward", linear="topk_forward_kl",
    ),
    "reverse_kl": Operator(
        reverse_kl, LOGITS, ("weight",), has_k=False, is_loss=True,
        backward="reverse_kl_backward", linear="reverse_kl",
    ),
}  # fmt: skip

LOGIT_OPS = tuple(name for name, op in OPERATORS.items() if op.of_logits and not op.is_loss)
TOPK_OPS = tuple(name for name, op in OPERATORS.items() if not op.of_logits)
LOSSES = tuple(name for name, op in OPERATORS.items() if op.is_loss)
LINEAR_LOSSES = {op.linear: name for name, op in OPERATORS.items() if op.linear}
USUAL = tuple(way for op in OPERATORS.values() for way in op.usual)
