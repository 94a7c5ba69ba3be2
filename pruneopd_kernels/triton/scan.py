"""Follow each response: cumulative drift C, reliability R, weight L, effective length E; and rewards times L.

This is a separate kernel after the one that finds the drift, because programs of one kernel cannot safely wait for each
other on every device. It is compiled without fused multiply-add: the product is rounded before the difference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import flags, float64_bits, per_position
from .summary import float64


@triton.jit
def response_bound(cu_seqlens, b, length, positions):
    """Return where response b begins; cu_seqlens is never trusted."""
    bound = b.to(tl.int64) * length
    if cu_seqlens is not None:
        bound = tl.load(cu_seqlens + b).to(tl.int64)
    return tl.minimum(tl.maximum(bound, 0), positions)


@triton.jit(do_not_specialize=["positions", "length", "w_drop", "w_base", "eps"])
def scan_kernel(drift, mask, cu_seqlens, carried, factors, unweighted, drift_count, reliability, weight,
                effective_length, rewards, positions, length, w_drop, w_base, eps, K: tl.constexpr,
                K_PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    w_drop, w_base, eps = float64(w_drop), float64(w_base), float64(eps)
    b = tl.program_id(0)
    begin = response_bound(cu_seqlens, b, length, positions)
    end = response_bound(cu_seqlens, b + 1, length, positions)
    count = tl.zeros([], tl.int64)
    if carried is not None:
        count += tl.load(carried + b).to(tl.int64)
    effective = tl.zeros([], tl.int32)
    for first in range(begin, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < end
        valid = inside
        if mask is not None:
            valid = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
        drifts = (valid & (tl.load(drift + n, mask=inside, other=0) != 0)).to(tl.int32)
        counts = tl.minimum(count + tl.cumsum(drifts, 0), 2147483647)
        count += tl.sum(drifts, 0)
        tl.store(drift_count + n, counts.to(tl.int32), mask=inside)
        lost = w_drop * counts.to(tl.float64)
        left = tl.maximum(1.0 - lost, 0.0)
        effective += tl.sum((valid & (left > eps)).to(tl.int32), 0)
        tl.store(reliability + n, tl.where(valid, left, 0.0).to(tl.float32), mask=inside)
        stored_weight = tl.where(valid, left + w_base, 0.0).to(tl.float32)
        tl.store(weight + n, stored_weight, mask=inside)
        if rewards is not None:
            j = tl.arange(0, K_PADDED)
            at = n[:, None] * K + j[None, :]
            exists = inside[:, None] & (j < K)[None, :]
            factor = stored_weight.to(tl.float64)
            if factors is not None:
                factor = tl.load(factors + n, mask=valid, other=0.0).to(tl.float64)
            factor = factor[:, None]
            reward = factor * tl.load(unweighted + at, mask=exists, other=0.0)
            reward = tl.where(factor == 0, 0.0, reward).to(tl.float32)  # 0 silences even a NaN
            tl.store(rewards + at, reward, mask=exists)
    tl.store(effective_length + b, effective)


def scan(drift: Tensor, a: Any, unweighted: Tensor | None = None, factors: Tensor | None = None) -> tuple[Any, ...]:
    """Return C, R, L and E, and the float64 rewards `[..., k]` times the factors, or else L, rounded once."""
    responses = drift.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    along = (torch.int32, torch.float32, torch.float32)
    counts, reliability, weight = (drift.new_empty(drift.shape, dtype=dtype) for dtype in along)
    effective_length = drift.new_empty((responses,), dtype=torch.int32)
    rewards = None if unweighted is None else torch.empty_like(unweighted, dtype=torch.float32)
    k = 1 if unweighted is None else unweighted.shape[-1]
    k_padded = triton.next_power_of_2(k)
    if responses:
        with torch.cuda.device_of(drift):
            scan_kernel[(responses,)](
                flags(drift), flags(a.mask), per_position(a.cu_seqlens), per_position(a.drift_count),
                per_position(factors), unweighted, counts, reliability, weight, effective_length, rewards,
                drift.numel(), drift.shape[1] if a.cu_seqlens is None else 0,
                *map(float64_bits, (a.w_drop, a.w_base, a.eps)),
                K=k, K_PADDED=k_padded, BLOCK=min(1024, 4096 // k_padded), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return counts, reliability, weight, effective_length, rewards
