"""What the operators must compute, written down a second time: NumPy in float64, one position after another.

Nothing is shared with the package. Here are the terms that several operators share, and the plain functions; the rest
stands in tests/ops/<op>.py. Arrays stand for tensors; floats are float64, unrounded, except where a definition rounds.
"""

import itertools
import math

import numpy as np

NEAR = 0.9e-6  # masses this close to the bound of the nucleus may fall on either side of it


class UndecidedError(Exception):
    """The data has no single answer: a number lies on a bound."""


# --- one row of logits -----------------------------------------------------------------------------------------------


def top(row, k):
    """The ids of the k first: NaN first, then descending; what is equal, by id."""
    is_nan = np.isnan(row)
    return np.lexsort((np.where(is_nan, 0.0, -row), ~is_nan))[:k]


def is_broken(row):
    return bool(np.isnan(row).any() or (row == np.inf).any() or not np.isfinite(row).any())


def lse(row, temperature):
    if np.isnan(row).any():
        return math.nan
    highest = row.max()
    if not np.isfinite(highest):
        return highest
    return highest / temperature + math.log(np.exp((row - highest) / temperature).sum())


def logprobs(row, temperature):
    if is_broken(row):
        return np.full(len(row), math.nan)
    shifted = (row - row.max()) / temperature
    return shifted - math.log(np.exp(shifted).sum())


def entropy(log_p):
    if np.isnan(log_p).any():
        return math.nan
    exists = log_p > -math.inf
    return -(np.exp(log_p[exists]) * log_p[exists]).sum()


def kl(log_p, log_q):
    if np.isnan(log_p).any() or np.isnan(log_q).any():
        return math.nan
    exists = log_p > -math.inf
    if (log_q[exists] == -math.inf).any():
        return math.inf
    return max(0.0, (np.exp(log_p[exists]) * (log_p[exists] - log_q[exists])).sum())


# --- one position ----------------------------------------------------------------------------------------------------


def filled(ids, logprobs):
    """Where a slot is not empty: there is an id, it is possible, and it has not come before."""
    first = [list(ids).index(i) == j for j, i in enumerate(ids)]
    return (np.asarray(ids) >= 0) & first & (True if logprobs is None else logprobs != -math.inf)


def overlap(s, t):
    """Of the ids in the filled slots of both sides."""
    return len(set(s) & set(t)) / max(len(s), len(t), 1)


def nucleus(teacher_ids, teacher_logprobs, top_p):
    """The accepted ids."""
    ids, mass, slots = [], 0.0, filled(teacher_ids, teacher_logprobs)
    given = list(zip(teacher_ids[slots], teacher_logprobs[slots], strict=True))
    if any(math.isnan(logprob) for _, logprob in given):
        return []
    if top_p == 1:
        return [i for i, _ in given]
    for i, logprob in given:
        ids.append(i)
        mass += math.exp(logprob)
        if abs(mass - (top_p - 1e-6)) <= NEAR:
            raise UndecidedError("a mass lies on the bound of the nucleus")
        if mass >= top_p - 1e-6:
            break
    return ids


def candidate_weights(log_p, log_q, reward_weight):
    """W of the candidates, or None where there is no mass to renormalise."""
    if reward_weight == "none":
        return np.full(len(log_p), 1 / len(log_p))
    logprob = log_p if reward_weight == "student" else log_q
    if logprob.max() == -math.inf:
        return None
    mass = np.exp(logprob - logprob.max())
    return mass / mass.sum()


def candidate_rewards(log_p, log_q, w):
    """W * (log q - log p) with its rules for -inf; w is None where there was no mass."""
    if w is None:
        return np.zeros(len(log_p))
    rewards = []
    for p, q, weight in zip(log_p, log_q, w, strict=True):
        if math.isnan(p) or math.isnan(q):
            rewards.append(math.nan)
        elif p == q or p == -math.inf:
            rewards.append(0.0)
        elif q == -math.inf:
            rewards.append(-math.inf)
        else:
            rewards.append(weight * (q - p))
    return np.array(rewards)


# --- layouts ---------------------------------------------------------------------------------------------------------


def validity(mask, shape):
    return np.ones(shape, bool) if mask is None else mask != 0


def responses(shape, cu_seqlens):
    """The flat positions of each response."""
    if cu_seqlens is None:
        return np.arange(math.prod(shape)).reshape(shape)
    return [np.arange(begin, end) for begin, end in itertools.pairwise(cu_seqlens)]


def rows(array):
    """One row a position."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


# --- losses ----------------------------------------------------------------------------------------------------------


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


@np.errstate(invalid="ignore")  # where they are not finite, there is no gradient
def by_logits_of(log_p, ids, coefficients, sizes_of_coefficients):
    """The derivative of sum(coefficients * log p[ids]) by the scaled logits, and the magnitudes that it adds up."""
    p = np.exp(log_p)
    by_logits, magnitudes = -p * coefficients.sum(), p * sizes_of_coefficients.sum()
    np.add.at(by_logits, ids, coefficients)
    np.add.at(magnitudes, ids, sizes_of_coefficients)
    return by_logits, magnitudes


# --- plain functions -------------------------------------------------------------------------------------------------


def opd_rewards(ids_s, p_s, ids_t, q_t, q_s, p_t, mask, weight, strategy="student", reward_weight="student"):
    """S and T, log p of S, log q of T, and what each side gives the other's."""
    shape, k = ids_s.shape[:-1], ids_s.shape[-1]
    valid_positions = validity(mask, shape)
    all_ids, all_rewards, all_valid = [], [], []
    for n in np.ndindex(shape):
        all_s, all_t, a_s, b_t, b_s, a_t = (None if x is None else x[n] for x in (ids_s, ids_t, p_s, q_t, q_s, p_t))
        s, t = np.where(a_s == -math.inf, -1, all_s), np.where(b_t == -math.inf, -1, all_t)
        if strategy == "student":
            ids, valid, a, b = all_s, s >= 0, a_s, b_s
        elif strategy == "teacher":
            ids, valid, a, b = all_t, t >= 0, a_t, b_t
        elif strategy == "intersection":
            ids, valid = all_s, np.array([i >= 0 and i in t for i in s])
            a, b = a_s, np.array([b_t[list(t).index(i)] if i in t else 0.0 for i in s])
        else:
            ids, a, b = np.concatenate([all_s, all_t]), np.concatenate([a_s, a_t]), np.concatenate([b_s, b_t])
            in_s = [i >= 0 and (strategy == "union" or i not in t) for i in s]
            valid = np.array(in_s + [i >= 0 and i not in s for i in t])
        rewards = np.zeros(len(ids))
        on = np.flatnonzero(valid & valid_positions[n])
        if len(on) and (weight is None or weight[n] != 0):
            if strategy == "symmetric_difference":
                w = {"student": np.exp(a[on]), "teacher": np.exp(b[on]), "none": np.ones(len(on))}[reward_weight]
            else:
                w = candidate_weights(a[on], b[on], reward_weight)
            rewards[on] = candidate_rewards(a[on], b[on], w) * (1.0 if weight is None else weight[n])
        all_ids.append(ids), all_rewards.append(rewards), all_valid.append(valid)
    m = 2 * k if strategy in ("union", "symmetric_difference") else k
    return tuple(np.array(x).reshape((*shape, m)) for x in (all_ids, all_rewards, all_valid))
