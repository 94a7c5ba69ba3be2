"""The terms of the equations in plain PyTorch, each once: rows of logits, drift, the scan, rewards, losses.

Pure functions. The reference, rewards, drift, `parallel` and `linear` are built from them. What is computed from logits
is computed in float64; the callers round the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# --- positions and dtypes -----------------------------------------------------------------------------------------


def has_values(tensor: Tensor) -> bool:
    """Return whether the values can be read without waiting for a GPU and without breaking a trace."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()


def valid_positions(mask: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
    """Return where the mask is not 0; without a mask, every position is valid."""
    return torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else mask != 0


def float_type(*logits: Tensor) -> torch.dtype:
    """Return the dtype of results computed from logits: float32, or float64 if any logits are float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


# --- rows of logits -----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of logits over the ids that exist, in float64. A gradient passes through."""

    logits: Tensor  # [..., V], zeros where a row is not used
    logprobs: Tensor  # [..., V], NaN where broken
    broken: Tensor  # a NaN, a +inf, or no finite logit
    temperature: float

    def lse(self) -> Tensor:
        return torch.logsumexp(self.logits / self.temperature, -1)


def read_rows(logits: Tensor, used: Tensor, vocab_size: int | None, temperature: float) -> Rows:
    """Compute the softmax of each row. A row that is not used is read as zeros and gets a gradient of 0."""
    x = torch.where(used[..., None], logits[..., :vocab_size].to(torch.float64), 0.0)
    broken = (x.isnan() | (x == torch.inf)).any(-1) | ~x.isfinite().any(-1)
    # Not scaled - lse: beside a logit of 1e38, lse cannot hold the log of the sum.
    logprobs = torch.log_softmax(x / temperature, -1).masked_fill(broken[..., None], torch.nan)
    return Rows(x, logprobs, broken, temperature)


def topk_ids(x: Tensor, k: int) -> Tensor:
    """Return the first k ids in order: descending logit; equal logits, lower id first; -0 == +0; NaN first of all."""
    # A radix sort compares the bits of -0 and of NaN: there must be one of each.
    x = x.masked_fill(x == 0, 0.0).masked_fill(x.isnan(), torch.nan)
    ids = torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]
    return ids.clone(memory_format=torch.contiguous_format)


def entropy(rows: Rows) -> Tensor:
    p = rows.logprobs.exp()
    return torch.where(p == 0, 0.0, -p * rows.logprobs).sum(-1)


def kl_divergence(p: Rows, q: Rows) -> Tensor:
    """Return KL(p || q): +inf if an id has log q = -inf < log p, even if p is too small for a float64."""
    exists = p.logprobs != -torch.inf
    log_p, log_q = (torch.where(exists, rows.logprobs, 0.0) for rows in (p, q))
    impossible = log_q == -torch.inf
    kl = (p.logprobs.exp() * (log_p - log_q.masked_fill(impossible, 0.0))).sum(-1)
    kl = kl + (kl.clamp(min=0.0) - kl).detach()  # the gradient passes even where the clamp applies
    return kl.masked_fill(impossible.any(-1), torch.inf).masked_fill(p.broken | q.broken, torch.nan)


def token_logprobs(rows: Rows, token_ids: Tensor | None) -> Tensor:
    """Return each token's log-probability; NaN if there is no token or no such id."""
    if token_ids is None:
        return torch.full(rows.broken.shape, torch.nan, dtype=torch.float64, device=rows.broken.device)
    exists = (token_ids >= 0) & (token_ids < rows.logprobs.shape[-1])
    ids = torch.where(exists, token_ids, 0).to(torch.int64)
    return rows.logprobs.gather(-1, ids[..., None]).squeeze(-1).masked_fill(~exists, torch.nan)


def candidate_logprobs(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return log p of candidates: NaN for an id that does not exist; for padding, that of id 0."""
    ids = ids.to(torch.int64)
    exists = ids < logprobs.shape[-1]
    return logprobs.gather(-1, torch.where(exists, ids, 0).clamp(min=0)).masked_fill(~exists, torch.nan)


# --- drift at a position (eq. 6, 7, 14-16) ------------------------------------------------------------------------

# A sum of rounded probabilities may fall short of top_p by this much.
MASS_TOLERANCE = 1e-6


def overlap_count(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """Count the student's candidates that are among the teacher's; an id below 0 matches nothing."""
    same = student_topk_ids[..., :, None] == teacher_topk_ids[..., None, :]
    return (same.any(-1) & (student_topk_ids >= 0)).sum(-1)


def overlap_of(count: Tensor, k: int) -> Tensor:
    """Return O (eq. 6) of an exact count, in float64."""
    return count.to(torch.float64) / k


def accepted(token_ids: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor, top_p: float) -> Tensor:
    """Return whether the token is in the nucleus: the shortest prefix whose mass reaches top_p, or all if none does."""
    candidate = teacher_topk_ids >= 0
    logprobs = teacher_topk_logprobs.to(torch.float64).masked_fill(~candidate, -torch.inf)
    mass = logprobs.exp().cumsum(-1)
    reached = (mass >= top_p - MASS_TOLERANCE) & candidate
    before = reached.cumsum(-1) - reached.to(torch.int64)  # shorter prefixes that reach top_p
    in_nucleus = candidate & (before == 0)
    return (in_nucleus & (teacher_topk_ids == token_ids[..., None])).any(-1) & ~logprobs.isnan().any(-1)


def overlap_and_drift(
    student_topk_ids: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor | None,
    broken: Tensor,
    valid: Tensor,
    a: Any,
) -> tuple[Tensor, Tensor]:
    """Return O in float32 and B; `a` has the operator's arguments that decide about drift."""
    count = overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(broken, 0)
    overlap = overlap_of(count, student_topk_ids.shape[-1])
    if a.metric == "overlap":
        drift = overlap < a.threshold
    else:
        assert teacher_topk_logprobs is not None
        drift = ~accepted(a.token_ids, teacher_topk_ids, teacher_topk_logprobs, a.top_p) | broken
    return torch.where(valid, overlap, 0.0).to(torch.float32), drift & valid


# --- along a response (eq. 8-10, 12) ------------------------------------------------------------------------------


class Along(NamedTuple):
    """What `reliability_from_drift` returns."""

    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor


def scan(drift: Tensor, valid: Tensor, a: Any) -> Along:
    """Compute C, R, L and E from drift at valid positions; `a` has the operator's other arguments."""
    cu_seqlens = response_ends(drift.shape, a.cu_seqlens, drift.device)
    position = torch.arange(drift.numel(), device=drift.device)
    response = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)

    def since_start(flags: Tensor) -> tuple[Tensor, Tensor]:
        """Count the flags up to and including each position, and in each response."""
        total = torch.cat([cu_seqlens.new_zeros(1), flags.flatten().cumsum(0)])
        return total[1:] - total[cu_seqlens[response]], total[cu_seqlens[1:]] - total[cu_seqlens[:-1]]

    count, _ = since_start(drift & valid)
    if a.drift_count is not None:
        # Positions after the last response start from 0.
        count = count + torch.cat([a.drift_count, a.drift_count.new_zeros(1)])[response]
    count = count.clamp(max=torch.iinfo(torch.int32).max).view(drift.shape)
    lost = a.w_drop * count.to(torch.float64)  # rounded before the difference: no fused multiply-add
    reliability = (1.0 - lost).clamp(0.0, 1.0)
    weight = reliability + a.w_base
    _, effective_length = since_start(valid & (reliability > a.eps))
    return Along(
        count.to(torch.int32),
        torch.where(valid, reliability, 0.0).to(torch.float32),
        torch.where(valid, weight, 0.0).to(torch.float32),
        effective_length.to(torch.int32),
    )


def response_ends(shape: Sequence[int], cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Return where each response begins and ends, int64 `[B + 1]`; padded ones are packed ones of equal length."""
    if cu_seqlens is None:
        responses, length = shape
        return torch.arange(responses + 1, device=device) * length
    return cu_seqlens.to(torch.int64).clamp(0, math.prod(shape))


# --- rewards (eq. 11) ---------------------------------------------------------------------------------------------


def candidate_rewards(
    student_logprobs: Tensor, teacher_logprobs: Tensor, valid: Tensor, reward_weight: str, renormalise: bool = True
) -> Tensor:
    """Return w[j] * (log q[j] - log p[j]) of the valid candidates and 0 elsewhere; w renormalised over the valid ones.

    0 if log q == log p (both -inf too), if log p = -inf, and if there is no mass to renormalise; otherwise -inf if
    log q = -inf, however small the weight. NaN if either is NaN.
    """
    a, b = student_logprobs, teacher_logprobs
    log_weights = {"student": a, "teacher": b, "none": torch.zeros_like(a)}[reward_weight]
    log_weights = log_weights.masked_fill(~valid, -torch.inf)
    weights = torch.softmax(log_weights, -1) if renormalise else log_weights.exp()
    no_mass = (log_weights.amax(-1, keepdim=True) == -torch.inf) & renormalise
    rewards = torch.where(b == -torch.inf, -torch.inf, weights * (b - a))
    rewards = rewards.masked_fill((a == b) | (a == -torch.inf) | no_mass, 0.0)
    rewards = rewards.masked_fill(a.isnan() | b.isnan(), torch.nan)
    return rewards.masked_fill(~valid, 0.0)


def weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Multiply; a weight of 0 gives 0 even for a NaN."""
    return torch.where(weight == 0, 0.0, weight * values)


# --- the policy loss over candidates ------------------------------------------------------------------------------

LARGEST_LOG_RATIO = 20.0


def policy_positions(topk_ids: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    """Return the valid positions that have a candidate with an advantage."""
    valid = valid_positions(mask, topk_ids, topk_ids.shape[:-1])
    return valid & ((topk_ids >= 0) & (advantages != 0)).any(-1)


def policy_terms(
    logprobs: Tensor,
    topk_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Tensor, Tensor]:
    """Return each candidate's term of the loss, and its derivative by the candidate's log-probability."""
    skipped = (topk_ids < 0) | (advantages == 0) | (logprobs == -torch.inf)
    logprobs = torch.where(skipped, 0.0, logprobs)
    advantages = torch.where(skipped, 0.0, advantages.detach().to(torch.float64))
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach().to(torch.float64)
    log_ratio = torch.where(skipped, 0.0, logprobs - old)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    # Not "greater than": a NaN stays, and of equal terms the unclipped one counts.
    by_ratio = ~(unclipped < clipped)
    terms = torch.where(by_ratio, unclipped, clipped)
    bound = torch.where(advantages < 0, -advantages * clip_dual, torch.inf)
    by_dual = terms > bound
    terms = torch.where(skipped, 0.0, torch.where(by_dual, bound, terms))
    moves = by_ratio & ~by_dual & ~(log_ratio.abs() > LARGEST_LOG_RATIO) & ~skipped
    return terms, torch.where(moves, unclipped, 0.0)


# --- forward KL over the teacher's candidates ---------------------------------------------------------------------


class ForwardTerms(NamedTuple):
    """One value for each of the teacher's candidates, in float64."""

    terms: Tensor  # of the loss
    derivatives: Tensor  # of the terms by the student's log-probabilities
    student_logprobs: Tensor  # -inf for padding
    teacher_logprobs: Tensor


class Measures(NamedTuple):
    """The other results of the forward KL over the teacher's candidates, per position."""

    student_mass: Tensor
    teacher_mass: Tensor
    overlap: Tensor
    overlap_token_advantage: Tensor


def forward_terms(
    student_logprobs: Tensor,
    broken: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    logprob_min: float | None,
) -> ForwardTerms:
    """Compute the terms from the student's log-probabilities of the teacher's candidates."""
    padding = teacher_topk_ids < 0
    a = student_logprobs.masked_fill(padding, -torch.inf)
    b = teacher_topk_logprobs.detach().to(torch.float64).masked_fill(padding, -torch.inf)
    a_raised, b_raised, moves = a, b, ~padding
    if logprob_min is not None:
        moves = moves & ~(a < logprob_min)
        a_raised, b_raised = a.clamp(min=logprob_min), b.clamp(min=logprob_min)
    q = b_raised.exp()
    has_mass = (b_raised != -torch.inf) & ~padding
    impossible = has_mass & (a_raised == -torch.inf) & ~b.isnan()
    counts = has_mass & ~impossible
    # Equal log-probabilities are not masked: their term is 0 and its derivative is not.
    terms = torch.where(counts, q * (torch.where(counts, b_raised, 0.0) - torch.where(counts, a_raised, 0.0)), 0.0)
    terms = terms.masked_fill(a.isnan(), torch.nan)  # also for an id that does not exist
    terms = terms.masked_fill(impossible, torch.inf)
    # A broken row makes even a loss over no candidates NaN.
    terms = terms.masked_fill(broken[..., None], torch.nan)
    return ForwardTerms(terms, torch.where(moves & has_mass, -q, 0.0), a, b)


def measures_of(
    student_topk_ids: Tensor,
    broken: Tensor,
    terms: ForwardTerms,
    teacher_topk_ids: Tensor,
    valid: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Measures:
    """Compute the measures in this dtype, the overlap in float32."""
    count = overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(broken, 0)
    shared = (teacher_topk_ids[..., :, None] == student_topk_ids[..., None, :]).any(-1)
    advantage = torch.where(shared, -terms.terms, 0.0).sum(-1) / shared.sum(-1).clamp(min=1)
    return Measures(
        torch.where(valid, terms.student_logprobs.exp().sum(-1).masked_fill(broken, torch.nan), 0.0).to(dtype),
        torch.where(valid, terms.teacher_logprobs.exp().sum(-1), 0.0).to(dtype),
        torch.where(valid, overlap_of(count, teacher_topk_ids.shape[-1]), 0.0).to(torch.float32),
        torch.where(valid, advantage.masked_fill(broken, torch.nan), 0.0).to(dtype),
    )


# --- reverse KL ---------------------------------------------------------------------------------------------------


def weighted_positions(like: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Return the valid positions whose weight is not 0; `like` are logits."""
    valid = valid_positions(mask, like, like.shape[:-1])
    return valid if weight is None else valid & (weight.detach() != 0)


def weighted_loss(loss: Tensor, weight: Tensor | None, used: Tensor) -> Tensor:
    """Multiply each position's loss by its weight; 0 where a position is not used."""
    return torch.where(used, loss if weight is None else weight.detach().to(torch.float64) * loss, 0.0)


def reverse_kl_state(
    student_state: list[Tensor],
    teacher_reference: Tensor,
    student_log_mass: Tensor,
    teacher_log_mass: Tensor,
    peak_log_ratio: Tensor,
    kl: Tensor,
    loss: Tensor,
    used: Tensor,
) -> Tensor:
    """Return what the backward pass needs, `[..., 5]`.

    The excess of an id is log p - log q - KL. The state holds the student's reference logit and mass, the teacher's
    reference logit, the offset and the excess of the student's peak. The offset is what is left of the excess where
    both logits equal their references: KL + log(ratio of the masses), NaN if the loss is not finite.
    """
    offset = torch.where(used, kl + student_log_mass - teacher_log_mass, 0.0).masked_fill(~loss.isfinite(), torch.nan)
    excess = torch.where(used, peak_log_ratio - kl, 0.0)
    return torch.stack([*student_state, teacher_reference, offset, excess], -1)


# --- what a forward pass saves ------------------------------------------------------------------------------------


def row_state(rows: Rows, used: Tensor) -> list[Tensor]:
    """Return what defines a row's softmax: a reference logit, and the sum of exp((logit - reference) / temperature)."""
    reference = rows.logits.amax(-1)
    mass = ((rows.logits - reference[..., None]) / rows.temperature).exp().sum(-1)
    return [torch.where(used, x.masked_fill(rows.broken, torch.nan), 0.0) for x in (reference, mass)]


def coefficients_of(loss: Tensor, derivatives: Tensor, used: Tensor) -> Tensor:
    """Return the derivatives by the candidates' log-probabilities; NaN where the loss is not finite."""
    return torch.where(used[..., None], derivatives, 0.0).masked_fill(~loss.isfinite()[..., None], torch.nan)
