"""What the losses must compute and what their gradients must be, written down a second time, as in gold.py.

Each function takes the gradient of the loss, `upstream` `[...]`, and then what its operator takes.
"""

import math
from typing import NamedTuple

import numpy as np

import gold

NEAR = 1e-4  # ratios this close to a bound may fall on either side of it


class Answer(NamedTuple):
    outputs: dict  # the operator's fields
    gradient: np.ndarray  # of sum(upstream * loss) by the student's logits
    sizes: dict  # of each of them the largest sum of magnitudes that it is computed from


class Sizes:
    """The largest of what has been put in, by name; what is not finite has no size."""

    def __init__(self, *names):
        self.of = dict.fromkeys(names, 0.0)

    def put(self, name, values):
        values = np.abs(np.atleast_1d(values))
        self.of[name] = max(self.of[name], values[np.isfinite(values)].max(initial=0.0))


def is_finite_as_float32(value):
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(value)))


def put_gradient(gradient, sizes, loss, by_logits, magnitudes, scale):
    """A row of the gradient from that of its loss: 0 where nobody asks for it, NaN where there is no loss."""
    if scale == 0:
        return
    if not is_finite_as_float32(loss):
        gradient[: len(by_logits)] = math.nan
        return
    gradient[: len(by_logits)] = scale * by_logits
    sizes.put("gradient", scale * magnitudes)


def by_logits_of(log_p, ids, coefficients, sizes_of_coefficients):
    """The derivative of sum(coefficients * log p[ids]) by the scaled logits, and the magnitudes that it adds up."""
    p = np.exp(log_p)
    by_logits, magnitudes = -p * coefficients.sum(), p * sizes_of_coefficients.sum()
    np.add.at(by_logits, ids, coefficients)
    np.add.at(magnitudes, ids, sizes_of_coefficients)
    return by_logits, magnitudes


# --- topk_policy_loss ------------------------------------------------------------------------------------------------


def policy_term(advantage, log_ratio, clip_low, clip_high, clip_dual):
    """One candidate's loss and its derivative by log p."""
    ratio = math.exp(min(max(log_ratio, -20.0), 20.0)) if not math.isnan(log_ratio) else math.nan
    if math.isnan(ratio) or math.isnan(advantage):
        return math.nan, math.nan
    for bound in (1 - clip_low, 1 + clip_high, clip_dual):
        near = "this test data has no one answer: a ratio lies on a bound"
        assert log_ratio == 0 or abs(ratio - bound) > NEAR * bound or bound == math.inf, near
    unclipped = -advantage * ratio
    clipped = -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high)
    if advantage < 0 and max(unclipped, clipped) > -advantage * clip_dual:
        return -advantage * clip_dual, 0.0
    if clipped > unclipped:
        return clipped, 0.0
    return unclipped, 0.0 if abs(log_ratio) > 20 else unclipped


def topk_policy_loss(
    upstream,
    student_logits,
    topk_ids,
    advantages,
    mask=None,
    *,
    old_logprobs=None,
    clip_low=0.2,
    clip_high=0.2,
    clip_dual=3.0,
    student_temperature=1.0,
    vocab_size=None,
):
    shape = student_logits.shape[:-1]
    valid = gold.validity(mask, shape)
    loss, gradient, sizes = np.zeros(shape), np.zeros(student_logits.shape), Sizes("loss", "gradient")
    for n in np.ndindex(shape):
        counting = np.flatnonzero((topk_ids[n] >= 0) & (advantages[n] != 0))
        if not valid[n] or len(counting) == 0:
            continue
        log_p = gold.logprobs(student_logits[n][:vocab_size].astype(np.float64), student_temperature)
        ids, terms, coefficients, amplified = topk_ids[n][counting], [], [], []
        for j, i in zip(counting, ids, strict=True):
            if log_p[i] == -math.inf:
                term = 0.0, 0.0
            else:
                log_ratio = log_p[i] * 0.0 if old_logprobs is None else log_p[i] - float(old_logprobs[n][j])
                term = policy_term(float(advantages[n][j]), log_ratio, clip_low, clip_high, clip_dual)
            terms.append(term[0]), coefficients.append(term[1])
            # A relative eps of log p is one of the ratio so many times.
            amplified.append(1.0 if old_logprobs is None or log_p[i] == -math.inf else 1.0 + abs(log_p[i]))
        loss[n] = sum(terms)
        sizes.put("loss", (np.abs(terms) * amplified).sum())
        by_logits, magnitudes = by_logits_of(log_p, ids, np.array(coefficients), np.abs(coefficients) * amplified)
        put_gradient(gradient[n], sizes, loss[n], by_logits, magnitudes, upstream[n] / student_temperature)
    return Answer({"loss": loss}, gradient, sizes.of)


# --- reverse_kl ------------------------------------------------------------------------------------------------------


def reverse_kl(
    upstream,
    student_logits,
    teacher_logits,
    mask=None,
    *,
    weight=None,
    student_temperature=1.0,
    teacher_temperature=1.0,
    vocab_size=None,
):
    shape = student_logits.shape[:-1]
    valid = gold.validity(mask, shape)
    loss, gradient, sizes = np.zeros(shape), np.zeros(student_logits.shape), Sizes("loss", "gradient")
    for n in np.ndindex(shape):
        w = 1.0 if weight is None else float(weight[n])
        if not valid[n] or w == 0:
            continue
        log_p = gold.logprobs(student_logits[n][:vocab_size].astype(np.float64), student_temperature)
        log_q = gold.logprobs(teacher_logits[n][:vocab_size].astype(np.float64), teacher_temperature)
        divergence = gold.kl(log_p, log_q)
        loss[n] = w * divergence
        by_logits, magnitudes = np.zeros(len(log_p)), np.zeros(len(log_p))
        if math.isfinite(divergence):
            exists = log_p > -math.inf
            sizes.put("loss", w * (divergence + gold.entropy(log_p)))  # the cross entropy, which it is a part of
            p, a, b = np.exp(log_p[exists]), log_p[exists], log_q[exists]
            by_logits[exists] = p * (a - b - divergence)
            magnitudes[exists] = p * (np.abs(a) + np.abs(b) + divergence)
        put_gradient(gradient[n], sizes, loss[n], by_logits, magnitudes, upstream[n] * w / student_temperature)
    return Answer({"loss": loss}, gradient, sizes.of)


# --- topk_forward_kl -------------------------------------------------------------------------------------------------


def forward_term(log_p, log_q, logprob_min):
    """One candidate's loss, its derivative by log p, and the magnitudes that the loss adds up."""
    if math.isnan(log_p) or math.isnan(log_q):
        return math.nan, math.nan, 0.0
    a, b = (log_p, log_q) if logprob_min is None else (max(log_p, logprob_min), max(log_q, logprob_min))
    if b == -math.inf:
        return 0.0, 0.0, 0.0
    if a == -math.inf:
        return math.inf, math.nan, 0.0
    q = math.exp(b)
    return q * (b - a), 0.0 if logprob_min is not None and log_p < logprob_min else -q, q * (abs(a) + abs(b))


def topk_forward_kl(
    upstream,
    student_logits,
    teacher_topk_ids,
    teacher_topk_logprobs,
    mask=None,
    *,
    logprob_min=None,
    student_temperature=1.0,
    vocab_size=None,
):
    shape, k = student_logits.shape[:-1], teacher_topk_ids.shape[-1]
    valid = gold.validity(mask, shape)
    measures = ["loss", "student_mass", "teacher_mass", "overlap", "overlap_token_advantage"]
    out = {name: np.zeros(shape) for name in measures} | {"student_topk_ids": np.zeros((*shape, k), np.int64)}
    out["student_topk_ids"][:] = np.arange(k)
    gradient, sizes = np.zeros(student_logits.shape), Sizes(*measures, "gradient")
    for n in np.ndindex(shape):
        if not valid[n]:
            continue
        row = student_logits[n][:vocab_size].astype(np.float64)
        log_p, students = gold.logprobs(row, student_temperature), gold.top(row, k)
        given = teacher_topk_ids[n] >= 0
        ids, log_q = teacher_topk_ids[n][given], teacher_topk_logprobs[n][given].astype(np.float64)
        columns = [forward_term(log_p[i], b, logprob_min) for i, b in zip(ids, log_q, strict=True)]
        terms, coefficients, magnitudes = np.array(columns).reshape(-1, 3).T
        shared, broken = np.isin(ids, students), gold.is_broken(row)
        out["student_topk_ids"][n] = students
        out["loss"][n] = math.nan if broken or np.isnan(terms).any() else terms.sum()
        out["student_mass"][n] = math.nan if broken else np.exp(log_p[ids]).sum()
        out["teacher_mass"][n] = np.exp(log_q).sum()
        out["overlap"][n] = 0.0 if broken else np.isin(students, ids).sum() / k
        mean = -terms[shared].sum() / shared.sum() if shared.any() else 0.0
        out["overlap_token_advantage"][n] = math.nan if broken else mean
        for name in ("student_mass", "teacher_mass"):
            sizes.put(name, out[name][n])
        for name in ("loss", "overlap_token_advantage"):
            sizes.put(name, magnitudes.sum())
        by_logits, magnitudes = by_logits_of(log_p, ids, coefficients, np.abs(coefficients))
        put_gradient(gradient[n], sizes, out["loss"][n], by_logits, magnitudes, upstream[n] / student_temperature)
    return Answer(out, gradient, sizes.of)
