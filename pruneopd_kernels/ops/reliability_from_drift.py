"""`reliability_from_drift`: along a response, from where it drifts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..results import ReliabilityFromDrift
from ._implementations import Impl
from ._registration import Outputs, call, register


def reliability_from_drift(
    drift: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    impl: Impl = "auto",
) -> ReliabilityFromDrift:
    """How reliable the teacher still is at each position of a response, given where the response drifts.

    With B the drift at valid positions, counted from the start of the response (Prune-OPD, arXiv:2605.07804)

        C[t] = drift_count + sum(B[:t + 1])     (8)
        R[t] = clip(1 - w_drop * C[t], 0, 1)    (9)
        L[t] = R[t] + w_base                    (10)
        E    = number of valid t with R[t] > eps    (12)

    C is exact. R is computed in float64, the product rounded before the difference, and L from that R; both are then
    rounded once. A masked position has R = L = 0 and the C of the position before it.

    Args:
        drift: bool `[B, T]` (padded) or `[N]` (packed).
        mask: bool, integer or float of drift's shape; non-zero where a position is valid. Holes are allowed. None: all
            positions are valid.
        cu_seqlens: int32 `[B + 1]`, required exactly when drift is packed: response b is `cu_seqlens[b]` to
            `cu_seqlens[b + 1]`; starts at 0, ends at N, does not decrease.
        drift_count: int32 `[B]`, >= 0: what C starts from, for a response that comes in chunks (see
            `next_drift_count`). None: 0.
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        `drift_count` (C) int32, `reliability` (R) float32 and `weight` (L) float32 of drift's shape, and
        `effective_length` (E) int32 `[B]`. None is differentiable.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

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
    outputs = call(
        "reliability_from_drift",
        drift=drift,
        mask=mask,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
        impl=impl,
    )
    return ReliabilityFromDrift(*outputs)


def empty_scan(like: Tensor, per_position: torch.Size, cu_seqlens: Tensor | None) -> Outputs:
    """Empty C, R, L and E of positions of this shape."""
    responses = per_position[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        like.new_empty(per_position, dtype=torch.int32),
        like.new_empty(per_position, dtype=torch.float32),
        like.new_empty(per_position, dtype=torch.float32),
        like.new_empty(responses, dtype=torch.int32),
    )


def _fake(*, drift: Tensor, cu_seqlens: Tensor | None, **_: Any) -> Outputs:
    return empty_scan(drift, drift.shape, cu_seqlens)


register("reliability_from_drift", _fake)
