"""The terms of the equations in plain PyTorch, each once: rows of logits, drift, the scan, rewards, losses.

Pure functions. The reference, rewards, drift, `parallel` and `linear` are built from them. What is computed from logits
is computed in float64; the callers round the results.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
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
    return torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else is_set(mask)


def is_set(mask: Tensor) -> Tensor:
    """Return where a mask is not 0: by its bits, because a processor may be told to take subnormal floats for 0."""
    if not mask.is_floating_point():
        return mask != 0
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[mask.element_size()]
    return mask.abs().view(integers) != 0


def where_used(used: Tensor | None, values: Tensor) -> Tensor:
    """Return the values of positions, or of their slots, that are used (None: all); 0 elsewhere, even for a NaN."""
    if used is None:
        return values
    return torch.where(used if used.ndim == values.ndim else used[..., None], values, 0.0)


def float_type(*logits: Tensor) -> torch.dtype:
    """Return the dtype of results computed from logits: float32, or float64 if any logits are float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def stored(results: Iterable[Tensor], valid: Tensor, a: Any) -> Iterator[Tensor]:
    """Yield results from both models' logits as they are returned: floats rounded, and 0 where masked."""
    dtype = float_type(a.student_logits, a.teacher_logits)
    return (where_used(valid, x).to(dtype) if x.is_floating_point() else x for x in results)


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


def read_both(a: Any, used: Tensor) -> tuple[Rows, Rows]:
    student = read_rows(a.student_logits, used, a.vocab_size, a.student_temperature)
    return student, read_rows(a.teacher_logits, used, a.vocab_size, a.teacher_temperature)


def topk_ids(x: Tensor, k: int) -> Tensor:
    """Return the first k ids in order: descending logit; equal logits, lower id first; -0 == +0; NaN first of all.

    Those with a logit of -inf, the last ones, only fill up empty slots: see `filled_slots`.
    """
    # A radix sort compares the bits of -0 and of NaN: there must be one of each.
    x = x.masked_fill(x == 0, 0.0).masked_fill(x.isnan(), torch.nan)
    ids = torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]
    return ids.clone(memory_format=torch.contiguous_format)


class Candidates(NamedTuple):
    """One model's top-k at each position."""

    ids: Tensor
    slots: Tensor  # the ids, -1 in empty slots
    logprobs: Tensor
    broken: Tensor  # whether the row has no softmax


def candidates(rows: Rows, k: int) -> Candidates:
    ids = topk_ids(rows.logits, k)
    return Candidates(ids, filled_slots(rows, ids), rows.logprobs.gather(-1, ids), rows.broken)


def filled_slots(rows: Rows, ids: Tensor) -> Tensor:
    """Return the candidates, -1 in the empty slots of a row that has too few ids with a logit above -inf."""
    return ids.masked_fill(rows.logits.gather(-1, ids) == -torch.inf, -1)


def entropy(rows: Rows) -> Tensor:
    p = rows.logprobs.exp()
    return -(p * rows.logprobs.masked_fill(p == 0, 0.0)).sum(-1)


def not_negative(divergence: Tensor) -> Tensor:
    """Return 0 for what rounding leaves below 0; the gradient passes even there."""
    return divergence - divergence.detach().clamp(max=0.0)


def kl_divergence(p: Rows, q: Rows) -> Tensor:
    """Return KL(p || q): +inf if an id has log q = -inf < log p, even if p is too small for a float64."""
    exists = p.logprobs != -torch.inf
    log_p, log_q = (torch.where(exists, rows.logprobs, 0.0) for rows in (p, q))
    impossible = log_q == -torch.inf
    kl = not_negative((p.logprobs.exp() * (log_p - log_q.masked_fill(impossible, 0.0))).sum(-1))
    return kl.masked_fill(impossible.any(-1), torch.inf).masked_fill(p.broken | q.broken, torch.nan)


def token_logprobs(rows: Rows, token_ids: Tensor | None) -> Tensor:
    """Return each token's log-probability; NaN if there is no token or no such id."""
    if token_ids is None:
        return torch.full(rows.broken.shape, torch.nan, dtype=torch.float64, device=rows.broken.device)
    exists = (token_ids >= 0) & (token_ids < rows.logprobs.shape[-1])
    ids = torch.where(exists, token_ids, 0).to(torch.int64)
    return rows.logprobs.gather(-1, ids[..., None]).squeeze(-1).masked_fill(~exists, torch.nan)


def candidate_logprobs(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return log p of candidates: NaN for an id that does not exist; 0 without a gradient for padding."""
    ids = ids.to(torch.int64)
    exists = ids < logprobs.shape[-1]
    of_ids = logprobs.gather(-1, torch.where(exists, ids, 0).clamp(min=0)).masked_fill(~exists, torch.nan)
    return torch.where(ids < 0, 0.0, of_ids)


# --- drift at a position (eq. 6, 7, 14-16) ------------------------------------------------------------------------

# A sum of rounded probabilities may fall short of top_p by this much.
MASS_TOLERANCE = 1e-6


def found_in(ids: Tensor, among: Tensor) -> Tensor:
    """Return which ids occur in the last axis of `among`; an id below 0 does not. No `[..., k, k]` is made."""
    ids, ordered = ids.to(torch.int64).contiguous(), among.to(torch.int64).sort(-1).values
    at = torch.searchsorted(ordered, ids).clamp(max=ordered.shape[-1] - 1)
    return (ordered.gather(-1, at) == ids) & (ids >= 0)


def filled_from_outside(ids: Tensor, logprobs: Tensor | None) -> Tensor:
    """Return candidates that a caller gave, -1 in empty slots: an id below 0, a log-probability of -inf, a repetition.

    On a CPU the checks refuse repetitions. On a GPU the first one counts.
    """
    if logprobs is not None:
        ids = ids.masked_fill(logprobs == -torch.inf, -1)
    return ids if ids.device.type == "cpu" else without_repetitions(ids)


def without_repetitions(ids: Tensor) -> Tensor:
    """Return ids `[..., k]` with -1 in place of an id that has been before it."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ids.masked_fill(torch.zeros_like(again).scatter(-1, order, again), -1)


def overlap_of(student_slots: Tensor, teacher_slots: Tensor, broken: Tensor) -> Tensor:
    """Return O (eq. 6) in float64: common candidates over the size of the larger set; -1 marks an empty slot."""
    count = found_in(student_slots, teacher_slots).sum(-1)
    size = torch.maximum((student_slots >= 0).sum(-1), (teacher_slots >= 0).sum(-1))
    return count.masked_fill(broken, 0).to(torch.float64) / size.clamp(min=1)


def accepted(token_ids: Tensor, teacher_slots: Tensor, teacher_topk_logprobs: Tensor, top_p: float) -> Tensor:
    """Return whether the token is in the nucleus: the shortest prefix whose mass reaches top_p, or all if none does."""
    candidate = teacher_slots >= 0
    logprobs = teacher_topk_logprobs.to(torch.float64).masked_fill(~candidate, -torch.inf)
    mass = logprobs.exp().cumsum(-1)
    reached = (mass >= top_p - MASS_TOLERANCE) & candidate & (top_p < 1)  # 1 means all
    before = reached.cumsum(-1) - reached.to(torch.int64)  # shorter prefixes that reach top_p
    in_nucleus = candidate & (before == 0)
    return (in_nucleus & (teacher_slots == token_ids[..., None])).any(-1) & ~logprobs.isnan().any(-1)


def overlap_and_drift(
    student_slots: Tensor, teacher_slots: Tensor, teacher_logprobs: Tensor | None, broken: Tensor, valid: Tensor, a: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O in float32, B and acceptance; `a` has the operator's arguments that decide about drift."""
    overlap = overlap_of(student_slots, teacher_slots, broken)
    is_accepted = torch.zeros_like(valid)
    if a.token_ids is not None and teacher_logprobs is not None:
        is_accepted = accepted(a.token_ids, teacher_slots, teacher_logprobs, a.top_p) & ~broken & valid
    drift = overlap < a.threshold if a.metric == "overlap" else ~is_accepted
    return where_used(valid, overlap).to(torch.float32), drift & valid, is_accepted


# --- along a response (eq. 8-10, 12) ------------------------------------------------------------------------------


def scan(drift: Tensor, valid: Tensor, a: Any) -> tuple[Tensor, ...]:
    """Return C, R, L and E from drift at valid positions; `a` has the operator's other arguments."""
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
    rounded = (where_used(valid, x).to(torch.float32) for x in (reliability, weight))
    return count.to(torch.int32), *rounded, effective_length.to(torch.int32)


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


def flowing(factor: Tensor, gradient: Tensor) -> Tensor:
    """Return what flows back through a multiplication by the factor; nothing does if either is 0, even beside a NaN."""
    return torch.where(gradient == 0, 0.0, weighted(factor, gradient))


# --- all of it at once --------------------------------------------------------------------------------------------


def score(
    student: Candidates, teacher: Candidates, teacher_on_student: Tensor, valid: Tensor, a: Any, weight: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the results of `reliability`, with rewards in float64, and acceptance; a weight takes L's place there."""
    broken = student.broken | teacher.broken
    overlap, drift, is_accepted = overlap_and_drift(student.slots, teacher.slots, teacher.logprobs, broken, valid, a)
    along = scan(drift, valid, a)
    # Not only the filled slots: a broken row has none, and its rewards are NaN.
    exists = (student.slots >= 0) | student.broken[..., None]
    rewards = candidate_rewards(student.logprobs, teacher_on_student, exists, a.reward_weight)
    weight = where_used(valid, along[2] if weight is None else weight).to(torch.float64)
    return (overlap, drift, *along, student.ids, weighted(weight[..., None], rewards)), is_accepted


# --- the policy loss over candidates ------------------------------------------------------------------------------

LARGEST_LOG_RATIO = 20.0


def policy_positions(topk_ids: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    """Return the valid positions that have a candidate with an advantage."""
    used = ((topk_ids >= 0) & (advantages != 0)).any(-1)
    return used if mask is None else used & is_set(mask)


def on_policy_terms(logprobs: Tensor, a: Any) -> tuple[Tensor, Tensor]:
    """Return what `policy_terms` does without `old_logprobs`: every ratio is 1, so a term is its own derivative."""
    counts = (a.topk_ids >= 0) & (a.advantages != 0) & (logprobs != -torch.inf)
    # The difference is 0, or NaN in a broken row.
    terms = torch.where(counts, (logprobs - logprobs - 1.0) * a.advantages, 0.0)
    return terms, terms


def policy_terms(logprobs: Tensor, a: Any) -> tuple[Tensor, Tensor]:
    """Return each candidate's term of the loss, and its derivative by the candidate's log-probability."""
    skipped = (a.topk_ids < 0) | (a.advantages == 0) | (logprobs == -torch.inf)
    logprobs = torch.where(skipped, 0.0, logprobs)
    advantages = torch.where(skipped, 0.0, a.advantages.detach().to(torch.float64))
    old = logprobs.detach() if a.old_logprobs is None else a.old_logprobs.detach().to(torch.float64)
    log_ratio = torch.where(skipped, 0.0, logprobs - old)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.detach().clamp(1 - a.clip_low, 1 + a.clip_high)
    # Not "greater than": a NaN stays, and of equal terms the unclipped one counts.
    by_ratio = ~(unclipped < clipped)
    terms = torch.where(by_ratio, unclipped, clipped)
    bound = torch.where(advantages < 0, -advantages * a.clip_dual, torch.inf)
    by_dual = terms > bound
    terms = torch.where(skipped, 0.0, torch.where(by_dual, bound, terms))
    moves = by_ratio & ~by_dual & ~(log_ratio.abs() > LARGEST_LOG_RATIO) & ~skipped
    return terms, torch.where(moves, unclipped, 0.0)


# --- forward KL over the teacher's candidates ---------------------------------------------------------------------

LEAST_REST = 2.0**-24
LEAST_NORMAL = 2.0**-1022


class TopkDivergence(NamedTuple):
    """The loss of `topk_forward_kl` and what it consists of, in float64."""

    terms: Tensor  # one for each candidate, 0 in empty slots
    loss: Tensor
    derivatives: Tensor  # of the loss, by the student's log-probabilities of the candidates
    student_mass: Tensor
    teacher_mass: Tensor


def topk_forward_kl(row: Any, a: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the floats of `topk_forward_kl` and the coefficients of its backward pass.

    `row` is what `row_stats` returns for the student; `a` has the operator's arguments.
    """
    valid = None if a.mask is None else is_set(a.mask)
    slots = filled_from_outside(a.teacher_topk_ids, a.teacher_topk_logprobs)
    kl = topk_divergence(row.logprobs, slots, a)
    spoilt = row.state[..., 0] * 0.0  # 0, or NaN in a broken row
    loss = where_used(valid, kl.loss + spoilt).to(row.lse.dtype)
    k = slots.shape[-1]
    own = row.topk_ids.masked_fill(torch.arange(k, device=slots.device) >= row.filled[..., None], -1)
    shared = found_in(slots, own)
    count = shared.sum(-1)
    # The divisor changes the sign. Adding `spoilt` turns -0 into 0.
    advantage = torch.where(shared, kl.terms, 0.0).sum(-1) / (-count).clamp(max=-1) + spoilt
    masses_and_advantage = kl.student_mass + spoilt, kl.teacher_mass, advantage
    student_mass, teacher_mass, advantage = (where_used(valid, x).to(loss.dtype) for x in masses_and_advantage)
    size = torch.maximum((slots >= 0).sum(-1), row.filled).clamp(min=1)
    overlap = where_used(valid, count.masked_fill(spoilt.isnan(), 0).to(torch.float32) / size)
    outputs = loss, student_mass, teacher_mass, overlap, advantage
    return outputs, coefficients_of(loss, kl.derivatives, valid)


def topk_divergence(student_logprobs: Tensor, slots: Tensor, a: Any) -> TopkDivergence:
    """Compute the divergence over the teacher's candidates and its tail; -1 marks an empty slot."""
    filled = slots >= 0
    log_q = torch.where(filled, a.teacher_topk_logprobs.detach().to(torch.float64), -torch.inf)
    log_p = torch.where(filled, student_logprobs, -torch.inf)
    p, q = log_p.exp(), log_q.exp()
    masses = mass_of_p, mass_of_q = p.sum(-1), q.sum(-1)
    if a.logprob_min is not None:
        is_raised = log_p < a.logprob_min
        log_p, log_q = (torch.where(filled, x.clamp(min=a.logprob_min), -torch.inf) for x in (log_p, log_q))
        p, q = log_p.exp(), log_q.exp()
        mass_of_p, mass_of_q = p.sum(-1), q.sum(-1)
    # A log p of -inf makes the term +inf even where q is too small for a float64.
    terms = torch.where(filled, q.clamp(min=LEAST_NORMAL) * (log_q - log_p), 0.0)
    loss, derivatives = terms.sum(-1), -q
    if a.tail == "generalised":
        loss, derivatives = loss + (mass_of_p - mass_of_q), p - q
    elif a.tail == "bucket":
        rest_of_p = 1.0 - mass_of_p
        rest_of_q = (1.0 - mass_of_q).clamp(min=LEAST_REST)
        ratio = rest_of_q / rest_of_p.clamp(min=LEAST_REST)
        loss = loss + rest_of_q * ratio.log()
        slope = torch.where(rest_of_p > LEAST_REST, ratio, 0.0)  # a clamped rest does not move
        derivatives = slope[..., None] * p - q
    if a.logprob_min is not None:
        derivatives = derivatives.masked_fill(is_raised, 0.0)
    if a.tail != "none":
        loss = not_negative(loss)
    return TopkDivergence(terms, loss, derivatives, *masses)


# --- reverse KL ---------------------------------------------------------------------------------------------------


def loss_factor(weight: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """Return what multiplies each position's divergence in a loss, in float64: 0 where masked, else the weight or 1."""
    weight = torch.ones_like(like, dtype=torch.float64) if weight is None else weight.detach().to(torch.float64)
    return weight if mask is None else where_used(is_set(mask), weight)


def spoilt_state(state: Tensor, loss: Tensor) -> Tensor:
    """Return the state of `reverse_kl` with an offset of NaN where the loss is not finite."""
    spoilt = ~loss.isfinite()[..., None] & (torch.arange(state.shape[-1], device=state.device) == 3)
    return state.masked_fill(spoilt, torch.nan)


def reverse_kl_state(
    student_state: Tensor, teacher_state: Tensor, peak_log_ratio: Tensor, kl: Tensor, used: Tensor
) -> Tensor:
    """Return what the backward pass needs, `[..., 5]`, from the states of both rows.

    It is the student's reference logit and mass, the teacher's reference logit, the offset and the excess of the
    student's peak. An id's excess is log p - log q - KL; it is the offset if both logits equal their references.
    """
    reference, mass = student_state[..., 0], student_state[..., 1]
    teacher_reference, teacher_mass = teacher_state[..., 0], teacher_state[..., 1]
    offset = where_used(used, kl + mass.log() - teacher_mass.log())
    excess = where_used(used, peak_log_ratio - kl)
    return torch.stack([reference, mass, teacher_reference, offset, excess], -1)


# --- what a forward pass saves ------------------------------------------------------------------------------------


def row_state(rows: Rows, used: Tensor) -> Tensor:
    """Return what defines a row's softmax: a logit r, the sum of exp((x - r) / T), and the mean of (x - r) / T."""
    reference = rows.logits.amax(-1)
    distance = (rows.logits - reference[..., None]) / rows.temperature
    mass = distance.exp().sum(-1)
    p = rows.logprobs.exp()
    mean = torch.where(p == 0, 0.0, p * distance).sum(-1)
    state = torch.stack([reference, mass, mean], -1).masked_fill(rows.broken[..., None], torch.nan)
    return where_used(used, state)


def logprobs_from_state(logits: Tensor, state: Tensor, temperature: float) -> Tensor:
    """Return log p of some ids from their logits and the state of their row, in float64."""
    return (logits.to(torch.float64) - state[..., :1]) / temperature - state[..., 1:2].log()


def coefficients_of(loss: Tensor, derivatives: Tensor, used: Tensor | None) -> Tensor:
    """Return the derivatives by the candidates' log-probabilities; NaN where the loss is not finite."""
    return where_used(used, derivatives) + (loss - loss)[..., None]  # 0, or NaN
