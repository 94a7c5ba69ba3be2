"""A replacement for TRL's `_chunked_divergence_loss`: the same arguments and results, weighted by reliability."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ... import PruneConfig
from ...linear.linear_opd_loss import linear_opd_results

Loss = Literal["reverse_kl", "topk_policy", "divergence"]

TRL_LOSS = "_chunked_divergence_loss"


def with_loss(method: FunctionType, loss: Callable[..., Any]) -> FunctionType:
    """Return a copy of a method of TRL's that calls `loss` in place of TRL's own.

    It is the same code with other globals. Nothing is patched, so nothing needs to be restored after an error.
    """
    names = {**method.__globals__, TRL_LOSS: loss}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


@dataclass(frozen=True)
class Side:
    """A model's hidden states `[B, T, H]`, its head, and what follows the product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    soft_cap: float | None

    def whole(self) -> Side:
        """Return the whole head if FSDP2 has left a part of it on each process; its gradient is scattered again.

        Without autocast it gets the hidden states' dtype, as TRL's loss gives it.
        """
        parts = self.weight, self.bias
        weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in parts)
        if not torch.is_autocast_enabled(self.hidden.device.type):
            weight, bias = (None if x is None else x.to(self.hidden.dtype) for x in (weight, bias))
        assert weight is not None
        return replace(self, weight=weight, bias=bias)

    def arguments(self, name: str, temperature: float) -> dict[str, Any]:
        """Return the operator's arguments. TRL scales before it caps, which is a cap and a temperature over scale."""
        return {
            f"{name}_hidden": self.hidden,
            f"{name}_weight": self.weight,
            f"{name}_bias": self.bias,
            f"{name}_softcap": None if self.soft_cap is None else self.soft_cap / self.logit_scale,
            f"{name}_temperature": temperature / self.logit_scale,
        }


@dataclass
class PrunedLoss:
    """Called once in place of TRL's loss; `scored` keeps what it found along the responses."""

    prune: PruneConfig
    loss: Loss
    token_ids: Tensor  # [B, T]
    mask: Tensor | None = None  # [B, T]
    scored: dict[str, Tensor] | None = None

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
        student = Side(
            student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale,
            student_final_logit_softcapping,
        )  # fmt: skip
        teacher = Side(
            teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale,
            teacher_final_logit_softcapping,
        )  # fmt: skip
        self.mask = mask = completion_mask != 0
        tokens = mask.sum()
        items = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        scale = 1 / torch.as_tensor(items, device=mask.device)  # by tokens; the sum of the weights would undo them
        with maybe_gather_lm_head_ctx(student.weight, student.bias, teacher.weight, teacher.bias):
            student, teacher = student.whole(), teacher.whole()
            loss = self._weighted(student, teacher, mask, scale, temperature)
            if self.loss == "divergence":
                loss = scale * self._divergence(student, teacher, mask, beta, temperature)
        assert self.scored is not None
        return loss, self.scored["entropy"].sum(), tokens

    def _weighted(self, student: Side, teacher: Side, mask: Tensor, scale: Tensor, temperature: float) -> Tensor:
        """Score the responses and return the weighted loss; for a divergence, which TRL computes, only score."""
        only_scores = self.loss == "divergence"
        with torch.no_grad() if only_scores else nullcontext():
            self.scored = linear_opd_results(
                **student.arguments("student", temperature), **teacher.arguments("teacher", temperature),
                mask=mask, token_ids=self.token_ids.to(mask.device), loss="topk_policy" if only_scores else self.loss,
                reduction="sum", scale=scale, **asdict(self.prune),
            )  # fmt: skip
        return self.scored["loss"]

    def _divergence(self, student: Side, teacher: Side, mask: Tensor, beta: float, temperature: float) -> Tensor:
        """Return the sum of TRL's own divergences, weighted."""
        assert self.scored is not None
        divergence, _ = ChunkedDivergenceFunction.apply(
            student.hidden[mask], student.weight, student.bias, teacher.hidden[mask], teacher.weight, teacher.bias,
            beta, temperature, student.logit_scale, student.soft_cap, teacher.logit_scale, teacher.soft_cap,
        )  # fmt: skip
        weighted: Tensor = self.scored["weight"][mask] * divergence
        return weighted.sum()
