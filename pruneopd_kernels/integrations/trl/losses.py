"""What takes the place of TRL's `_chunked_divergence_loss`: the same arguments and results, weighted by reliability."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ... import LinearOpdLoss, Reliability
from ...checks import bad_value
from ...config import PruneConfig
from ...linear import linear_opd_loss, linear_reliability

Loss = Literal["reverse_kl", "topk_policy", "divergence"]

TRL_LOSS = "_chunked_divergence_loss"
HALF = (torch.bfloat16, torch.float16)


def with_loss(method: FunctionType, loss: Callable[..., Any]) -> FunctionType:
    """A method of TRL's that calls `loss` where it would call TRL's, which stays as it is for everybody else.

    It is the same code with other globals: nothing is patched, so there is nothing to put back after an error, and
    nothing that another thread could see.
    """
    names = {**method.__globals__, TRL_LOSS: loss}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


def refuse_soft_cap(trainer: str, side: str, soft_cap: float | None) -> None:
    """The heads' logits are taken as products; a cap bends them after that."""
    if soft_cap is not None:
        bad_value(trainer, f"{side}'s final_logit_softcapping", "be None", soft_cap)


@dataclass(frozen=True)
class Side:
    """A model's hidden states `[B, T, H]` and its head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float


@dataclass
class PrunedLoss:
    """Called in place of TRL's loss, once; what it found along the responses stays in `scored`."""

    prune: PruneConfig
    loss: Loss
    token_ids: Tensor  # [B, T]
    mask: Tensor | None = None  # [B, T]
    scored: LinearOpdLoss | Reliability | None = None

    def __call__(
        self,
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the sum of the student's entropies and the number of valid positions, as TRL's returns them."""
        refuse_soft_cap("PruneDistillationTrainer", "student", student_final_logit_softcapping)
        refuse_soft_cap("PruneDistillationTrainer", "teacher", teacher_final_logit_softcapping)
        student = Side(student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale)
        teacher = Side(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale)
        self.mask = mask = completion_mask != 0
        tokens = mask.sum()
        items = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        scale = 1 / torch.as_tensor(items, device=mask.device)  # of the tokens: dividing by weights would undo them
        form = self._divergence if self.loss == "divergence" else self._linear
        with maybe_gather_lm_head_ctx(student.weight, student.bias, teacher.weight, teacher.bias):
            student, teacher, float32_logits = _float32_logits(_unsharded(student), _unsharded(teacher))
            with float32_logits:
                loss, entropy = form(student, teacher, mask, scale, beta, temperature)
        return loss, entropy, tokens

    def _linear(
        self, student: Side, teacher: Side, mask: Tensor, scale: Tensor, beta: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        assert self.loss != "divergence"
        self.scored = out = linear_opd_loss(
            **self._arguments(student, teacher, mask, temperature), loss=self.loss, reduction="sum", scale=scale
        )
        return out.loss, out.entropy.sum()

    def _divergence(
        self, student: Side, teacher: Side, mask: Tensor, scale: Tensor, beta: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        self.scored = linear_reliability(**self._arguments(student, teacher, mask, temperature))
        divergence, entropy = ChunkedDivergenceFunction.apply(
            student.hidden[mask], student.weight, student.bias, teacher.hidden[mask], teacher.weight, teacher.bias,
            beta, temperature, student.logit_scale, None, teacher.logit_scale, None,
        )  # fmt: skip
        return scale * (self.scored.weight[mask] * divergence).sum(), entropy.sum()

    def _arguments(self, student: Side, teacher: Side, mask: Tensor, temperature: float) -> dict[str, Any]:
        """A factor of the logits is a divisor of the temperature; the bias is scaled too, in TRL as here."""
        return {
            "student_hidden": student.hidden,
            "student_weight": student.weight,
            "student_bias": student.bias,
            "student_temperature": temperature / student.logit_scale,
            "teacher_hidden": teacher.hidden,
            "teacher_weight": teacher.weight,
            "teacher_bias": teacher.bias,
            "teacher_temperature": temperature / teacher.logit_scale,
            "mask": mask,
            "token_ids": self.token_ids.to(mask.device),
            **asdict(self.prune),
        }


def _unsharded(side: Side) -> Side:
    """The whole head, where FSDP2 has left a part of it on each process; its gradient goes back the same way."""
    weight, bias = side.weight, side.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor().to(side.hidden.dtype)
        bias = None if bias is None else bias.full_tensor()  # type: ignore[attr-defined]
    return replace(side, weight=weight, bias=bias)


def _float32_logits(student: Side, teacher: Side) -> tuple[Side, Side, AbstractContextManager[Any]]:
    """What makes products as TRL does: of operands in autocast's dtype, else the hidden states', into float32."""
    dtypes = {student.hidden.dtype, teacher.hidden.dtype}
    kind = student.hidden.device.type
    if torch.is_autocast_enabled(kind):
        return student, teacher, nullcontext()
    if len(dtypes) == 1 and student.hidden.dtype in HALF:
        return student, teacher, torch.autocast(kind, student.hidden.dtype)
    return _float32(student), _float32(teacher), nullcontext()


def _float32(side: Side) -> Side:
    """Of half precision, products in float32 are exact; of float32 nothing is copied."""
    operands = side.hidden.dtype
    weight, bias = (None if x is None else x.to(operands).to(torch.float32) for x in (side.weight, side.bias))
    assert weight is not None
    return replace(side, hidden=side.hidden.to(torch.float32), weight=weight, bias=bias)
