"""A replacement for TRL's `_chunked_divergence_loss`: the same arguments and results, weighted by reliability."""

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

from ... import LinearOpdLoss, PruneConfig, Reliability, checks, linear_opd_loss, linear_reliability

Loss = Literal["reverse_kl", "topk_policy", "divergence"]

TRL_LOSS = "_chunked_divergence_loss"
HALF = (torch.bfloat16, torch.float16)


def with_loss(method: FunctionType, loss: Callable[..., Any]) -> FunctionType:
    """Return a copy of a method of TRL's that calls `loss` in place of TRL's own.

    It is the same code with other globals. Nothing is patched: there is nothing to restore after an error, and no other
    thread sees a difference.
    """
    names = {**method.__globals__, TRL_LOSS: loss}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


def refuse_soft_cap(trainer: str, side: str, soft_cap: float | None) -> None:
    """Raise ValueError if a head caps its logits: here logits are plain products."""
    if soft_cap is not None:
        checks.bad_value(trainer, f"{side}'s final_logit_softcapping", "be None", soft_cap)


@dataclass(frozen=True)
class Side:
    """A model's hidden states `[B, T, H]` and its head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float


@dataclass
class PrunedLoss:
    """Called once in place of TRL's loss; `scored` keeps what it found along the responses."""

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
        """Return the loss, the sum of the student's entropies and the number of valid positions, as TRL's loss does."""
        refuse_soft_cap("PruneDistillationTrainer", "student", student_final_logit_softcapping)
        refuse_soft_cap("PruneDistillationTrainer", "teacher", teacher_final_logit_softcapping)
        student = Side(student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale)
        teacher = Side(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale)
        self.mask = mask = completion_mask != 0
        tokens = mask.sum()
        items = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        scale = 1 / torch.as_tensor(items, device=mask.device)  # by tokens; the sum of the weights would undo them
        with maybe_gather_lm_head_ctx(student.weight, student.bias, teacher.weight, teacher.bias):
            student, teacher, float32_logits = _float32_logits(_unsharded(student), _unsharded(teacher))
            with float32_logits:
                loss, entropy = self._weighted(student, teacher, mask, scale, beta, temperature)
        return loss, entropy.sum(), tokens

    def _weighted(
        self, student: Side, teacher: Side, mask: Tensor, scale: Tensor, beta: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {
            "student_hidden": student.hidden,
            "student_weight": student.weight,
            "student_bias": student.bias,
            "student_temperature": temperature / student.logit_scale,  # TRL scales the bias, too
            "teacher_hidden": teacher.hidden,
            "teacher_weight": teacher.weight,
            "teacher_bias": teacher.bias,
            "teacher_temperature": temperature / teacher.logit_scale,
            "mask": mask,
            "token_ids": self.token_ids.to(mask.device),
            **asdict(self.prune),
        }
        if self.loss != "divergence":
            self.scored = out = linear_opd_loss(**arguments, loss=self.loss, reduction="sum", scale=scale)
            return out.loss, out.entropy
        self.scored = linear_reliability(**arguments)
        divergence, entropy = ChunkedDivergenceFunction.apply(
            student.hidden[mask], student.weight, student.bias, teacher.hidden[mask], teacher.weight, teacher.bias,
            beta, temperature, student.logit_scale, None, teacher.logit_scale, None,
        )  # fmt: skip
        return scale * (self.scored.weight[mask] * divergence).sum(), entropy


def _unsharded(side: Side) -> Side:
    """Return the whole head if FSDP2 has left a part of it on each process; its gradient is scattered again."""
    weight, bias = side.weight, side.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor().to(side.hidden.dtype)
        bias = None if bias is None else bias.full_tensor()  # type: ignore[attr-defined]
    return replace(side, weight=weight, bias=bias)


def _float32_logits(student: Side, teacher: Side) -> tuple[Side, Side, AbstractContextManager[Any]]:
    """Return operands and a context that multiply as TRL does: in autocast's or the hidden states' dtype."""
    kind, dtype = student.hidden.device.type, student.hidden.dtype
    if torch.is_autocast_enabled(kind):
        return student, teacher, nullcontext()
    if dtype in HALF and dtype == teacher.hidden.dtype:
        return student, teacher, torch.autocast(kind, dtype)
    return _float32(student), _float32(teacher), nullcontext()


def _float32(side: Side) -> Side:
    """Return float32 copies: products of half-precision operands are exact then, and float32 is not copied."""
    operands = side.hidden.dtype
    weight, bias = (None if x is None else x.to(operands).to(torch.float32) for x in (side.weight, side.bias))
    assert weight is not None
    return replace(side, hidden=side.hidden.to(torch.float32), weight=weight, bias=bias)
