"""`token_stats`: the row pass with entropies and divergences, then at each position candidates and statistics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import outputs_of
from .position import for_any_axes, run_at_positions
from .selection import compare, id_of
from .summary import logprobs_at


@triton.jit
def store_candidates(candidates, at, own, other, ids_out, own_out, other_out, K: tl.constexpr):
    """Store one side's candidates in order: ids, log-probabilities in their own row and in the other's."""
    exists = tl.arange(0, candidates.shape[0]) < K
    ids = id_of(candidates)
    own_logprobs, other_logprobs = logprobs_at(own, ids, exists), logprobs_at(other, ids, exists)
    tl.store(ids_out + at, ids.to(tl.int64), mask=exists)
    tl.store(own_out + at, own_logprobs.to(tl.float32), mask=exists)
    tl.store(other_out + at, other_logprobs.to(tl.float32), mask=exists)


@triton.jit
def store_row(side, token, vocab_size, n, lse_out, entropy_out, token_logprob_out):
    """Store one side's statistics that don't depend on candidates."""
    _, _, lse, entropy = side[1]
    tl.store(lse_out + n, lse.to(tl.float32))
    tl.store(entropy_out + n, entropy.to(tl.float32))
    exists = (token >= 0) & (token < vocab_size)
    at_token = logprobs_at(side, token, exists)
    tl.store(token_logprob_out + n, tl.where(exists, at_token, float("nan")).to(tl.float32))


@triton.jit
def token_stats_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars,
                         K: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    (x_topk_ids, x_topk_logprobs, y_topk_ids, y_topk_logprobs, y_on_x_logprobs, x_on_y_logprobs, overlap, x_lse, y_lse,
     x_entropy, y_entropy, reverse_kl, forward_kl, x_token_logprob, y_token_logprob) = outputs  # fmt: skip
    tl.store(reverse_kl + n, divergences[0].to(tl.float32))
    tl.store(forward_kl + n, divergences[1].to(tl.float32))
    token = tl.full([], -1, tl.int64)
    if inputs[0] is not None:
        token = tl.load(inputs[0] + n).to(tl.int64)
    x, y = sides
    store_row(x, token, vocab_size, n, x_lse, x_entropy, x_token_logprob)
    store_row(y, token, vocab_size, n, y_lse, y_entropy, y_token_logprob)
    x_best, y_best, x_rank, y_rank, share = compare(candidates, K)
    tl.store(overlap + n, tl.where(broken, 0.0, share).to(tl.float32))
    store_candidates(x_best, n * K + x_rank, x, y, x_topk_ids, x_topk_logprobs, y_on_x_logprobs, K)
    store_candidates(y_best, n * K + y_rank, y, x, y_topk_ids, y_topk_logprobs, x_on_y_logprobs, K)


@for_any_axes
def token_stats(a: Any) -> tuple[Tensor, ...]:
    candidates = [torch.int64, torch.float32, torch.int64, *[torch.float32] * 3]
    outputs = outputs_of(a, *candidates, last=(a.k,)) + outputs_of(a, *[torch.float32] * 9)
    run_at_positions(token_stats_position, a, (a.token_ids,), outputs, mask=a.mask, k=a.k, stats=(2, 2))
    return tuple(outputs)
