"""`reliability_from_drift`: along a response, from where it drifts."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import checks
from ..config import PruneConfig
from ._operator import Impl, Tensor, operator


@operator
def reliability_from_drift(
    drift: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    w_drop: float = PruneConfig.w_drop,
    w_base: float = PruneConfig.w_base,
    eps: float = PruneConfig.eps,
    impl: Impl = "auto",
) -> ReliabilityFromDrift:
    """How reliable the teacher still is at each position of a response, given where the response drifts.

    With B the drift at valid positions, counted from the start of the response (Prune-OPD, arXiv:2605.07804)

        C[t] = drift_count + sum(B[:t + 1])     (8)
        R[t] = clip(1 - w_drop * C[t], 0, 1)    (9)
        L[t] = R[t] + w_base                    (10)
        E    = number of valid t with R[t] > eps    (12)

    C is exact. R is computed in float64, the product rounded before the difference, and L from that R; both are then
    rounded once. A masked position has R = L = 0 and the C of the position before it. Arguments that
    `reliability` has, too, mean the same.

    Args:
        drift: bool `[B, T]` (padded) or `[N]` (packed).

    Returns:
        `drift_count` (C) int32, `reliability` (R) float32 and `weight` (L) float32 of drift's shape, and
        `effective_length` (E) int32 `[B]`. None is differentiable.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import reliability_from_drift
        >>> drift = torch.tensor([[True, False, True, True]])
        >>> out = reliability_from_drift(drift, w_drop=0.5)
        >>> out.drift_count
        tensor([[1, 1, 2, 3]], dtype=torch.int32)
        >>> out.reliability
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
        >>> out.effective_length
        tensor([2], dtype=torch.int32)
    """
    ...


class ReliabilityFromDrift(NamedTuple):
    """Of `reliability_from_drift`: those fields of `Reliability` that follow from the drift alone."""

    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    drift = a.drift
    if drift.ndim not in (1, 2):
        checks.bad_value(op, "drift", "have shape [B, T] or [N]", list(drift.shape))
    checks.has_dtype(op, "drift", drift, ("bool",))
    checks.mask_of_positions(op, a.mask, drift, drift.shape)
    checks.responses(op, a.cu_seqlens, a.drift_count, drift, drift.shape, "drift is {}]")
    checks.scalars(op, a)
    if values:
        checks.response_values(op, a.cu_seqlens, a.drift_count, drift.shape)


def fake(a: Any, empty: Any) -> Any:
    return empty.scan(a.cu_seqlens)
