"""What the operators must compute, written down a second time: NumPy in float64, one position after another.

Nothing is shared with the package. Arguments and results have the operators' names, arrays instead of tensors; floats
are returned in float64, unrounded, except where the definition itself rounds.
"""

import itertools
import math

import numpy as np

NEAR = 0.9e-6  # masses this close to the bound of the nucleus may fall on either side of it


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


def nucleus(teacher_ids, teacher_logprobs, top_p):
    """The accepted ids, and how near a mass came to the bound."""
    ids, mass, nearest = [], 0.0, math.inf
    given = [(i, logprob) for i, logprob in zip(teacher_ids, teacher_logprobs, strict=True) if i >= 0]
    if any(math.isnan(logprob) for _, logprob in given):
        return [], nearest
    for i, logprob in given:
        ids.append(i)
        mass += math.exp(logprob)
        nearest = min(nearest, abs(mass - (top_p - 1e-6)))
        if mass >= top_p - 1e-6:
            break
    return ids, nearest


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


# --- the operators ---------------------------------------------------------------------------------------------------


def token_stats(
    student_logits,
    teacher_logits,
    mask=None,
    *,
    token_ids=None,
    k=16,
    student_temperature=1.0,
    teacher_temperature=1.0,
    vocab_size=None,
):
    shape = student_logits.shape[:-1]
    vocab_size = vocab_size or student_logits.shape[-1]
    student = rows(student_logits)[:, :vocab_size].astype(np.float64)
    teacher = rows(teacher_logits)[:, :vocab_size].astype(np.float64)
    valid = validity(mask, shape).reshape(-1)
    positions = len(student)

    def ids():
        return np.tile(np.arange(k), (positions, 1))

    def per_candidate():
        return np.zeros((positions, k))

    def per_position():
        return np.zeros(positions)

    out = {
        "student_topk_ids": ids(),
        "student_topk_logprobs": per_candidate(),
        "teacher_topk_ids": ids(),
        "teacher_topk_logprobs": per_candidate(),
        "teacher_on_student_logprobs": per_candidate(),
        "student_on_teacher_logprobs": per_candidate(),
        "overlap": per_position(),
        "student_lse": per_position(),
        "teacher_lse": per_position(),
        "student_entropy": per_position(),
        "teacher_entropy": per_position(),
        "reverse_kl": per_position(),
        "forward_kl": per_position(),
        "student_token_logprob": per_position(),
        "teacher_token_logprob": per_position(),
    }
    for n in np.flatnonzero(valid):
        log_p = logprobs(student[n], student_temperature)
        log_q = logprobs(teacher[n], teacher_temperature)
        s, t = top(student[n], k), top(teacher[n], k)
        either_broken = is_broken(student[n]) or is_broken(teacher[n])
        out["student_topk_ids"][n], out["teacher_topk_ids"][n] = s, t
        out["student_topk_logprobs"][n], out["teacher_topk_logprobs"][n] = log_p[s], log_q[t]
        out["teacher_on_student_logprobs"][n], out["student_on_teacher_logprobs"][n] = log_q[s], log_p[t]
        out["overlap"][n] = 0.0 if either_broken else len(set(s) & set(t)) / k
        out["student_lse"][n] = lse(student[n], student_temperature)
        out["teacher_lse"][n] = lse(teacher[n], teacher_temperature)
        out["student_entropy"][n], out["teacher_entropy"][n] = entropy(log_p), entropy(log_q)
        out["reverse_kl"][n], out["forward_kl"][n] = kl(log_p, log_q), kl(log_q, log_p)
        token = -1 if token_ids is None else token_ids.reshape(-1)[n]
        exists = 0 <= token < vocab_size
        out["student_token_logprob"][n] = log_p[token] if exists else math.nan
        out["teacher_token_logprob"][n] = log_q[token] if exists else math.nan
    return {name: array.reshape(shape + array.shape[1:]) for name, array in out.items()}


def reliability_from_drift(drift, mask=None, *, cu_seqlens=None, drift_count=None, w_drop=0.01, w_base=0.5, eps=1e-8):
    shape = drift.shape
    drift, valid = drift.reshape(-1), validity(mask, shape).reshape(-1)
    all_responses = responses(shape, cu_seqlens)
    count, kept, weight = np.zeros(drift.size, np.int64), np.zeros(drift.size), np.zeros(drift.size)
    effective_length = np.zeros(len(all_responses), np.int64)
    for b, response in enumerate(all_responses):
        drifted = 0 if drift_count is None else int(drift_count[b])
        for n in response:
            drifted += bool(valid[n] and drift[n])
            count[n] = drifted
            if valid[n]:
                kept[n] = min(max(1.0 - float(w_drop) * drifted, 0.0), 1.0)
                weight[n] = kept[n] + w_base
                effective_length[b] += kept[n] > eps
    return {
        "drift_count": count.reshape(shape),
        "reliability": kept.reshape(shape),
        "weight": weight.reshape(shape),
        "effective_length": effective_length,
    }


def reliability_from_topk(
    student_topk_ids,
    teacher_topk_ids,
    mask=None,
    *,
    teacher_topk_logprobs=None,
    token_ids=None,
    cu_seqlens=None,
    drift_count=None,
    threshold=0.7,
    w_drop=0.01,
    w_base=0.5,
    eps=1e-8,
    metric="overlap",
    top_p=0.95,
):
    shape, k = student_topk_ids.shape[:-1], student_topk_ids.shape[-1]
    student, teacher = rows(student_topk_ids), rows(teacher_topk_ids)
    valid = validity(mask, shape).reshape(-1)
    overlap, drift, nearest = np.zeros(len(student)), np.zeros(len(student), bool), math.inf
    for n in np.flatnonzero(valid):
        count = sum(1 for i in student[n] if i >= 0 and i in teacher[n])
        overlap[n] = count / k
        if metric == "overlap":
            drift[n] = count / k < threshold
        else:
            ids, near = nucleus(teacher[n], rows(teacher_topk_logprobs)[n].astype(np.float64), top_p)
            drift[n] = token_ids.reshape(-1)[n] not in ids
            nearest = min(nearest, near)
    scan = reliability_from_drift(
        drift.reshape(shape),
        mask,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
    )
    assert nearest > NEAR, "this test data has no one answer: a mass lies on the bound of the nucleus"
    return {"overlap": overlap.reshape(shape), "drift": drift.reshape(shape), **scan}


def reliability(
    student_logits,
    teacher_logits,
    mask=None,
    *,
    token_ids=None,
    cu_seqlens=None,
    drift_count=None,
    k=16,
    threshold=0.7,
    w_drop=0.01,
    w_base=0.5,
    eps=1e-8,
    metric="overlap",
    top_p=0.95,
    reward_weight="student",
    student_temperature=1.0,
    teacher_temperature=1.0,
    vocab_size=None,
):
    shape = student_logits.shape[:-1]
    stats = token_stats(
        student_logits,
        teacher_logits,
        mask,
        k=k,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    valid = validity(mask, shape).reshape(-1)
    broken = np.isnan(stats["student_entropy"] + stats["teacher_entropy"]).reshape(-1)
    overlap = stats["overlap"].reshape(-1)
    drift, nearest = np.zeros(valid.size, bool), math.inf
    for n in np.flatnonzero(valid):
        if metric == "overlap":
            drift[n] = overlap[n] < threshold
        else:
            ids, near = nucleus(rows(stats["teacher_topk_ids"])[n], rows(stats["teacher_topk_logprobs"])[n], top_p)
            drift[n] = broken[n] or token_ids.reshape(-1)[n] not in ids
            nearest = min(nearest, near)
    assert nearest > NEAR, "this test data has no one answer: a mass lies on the bound of the nucleus"

    scan = reliability_from_drift(
        drift.reshape(shape),
        mask,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
    )
    rewards, weight = np.zeros((valid.size, k)), scan["weight"].reshape(-1)
    for n in np.flatnonzero(valid & (weight != 0)):
        log_p = rows(stats["student_topk_logprobs"])[n]
        log_q = rows(stats["teacher_on_student_logprobs"])[n]
        if broken[n]:
            rewards[n] = math.nan
        else:
            w = candidate_weights(log_p, log_q, reward_weight)
            rewards[n] = weight[n] * candidate_rewards(log_p, log_q, w)
    return {
        "overlap": overlap.reshape(shape),
        "drift": drift.reshape(shape),
        **scan,
        "topk_ids": stats["student_topk_ids"],
        "rewards": rewards.reshape((*shape, k)),
    }


# --- plain functions -------------------------------------------------------------------------------------------------


def opd_rewards(
    student_topk_ids,
    student_topk_logprobs,
    teacher_topk_ids,
    teacher_topk_logprobs,
    teacher_on_student_logprobs=None,
    student_on_teacher_logprobs=None,
    mask=None,
    *,
    strategy="student",
    reward_weight="student",
    weight=None,
):
    shape, k = student_topk_ids.shape[:-1], student_topk_ids.shape[-1]
    valid_positions = validity(mask, shape)
    all_ids, all_rewards, all_valid = [], [], []
    for n in np.ndindex(shape):
        s, t = student_topk_ids[n], teacher_topk_ids[n]
        a_s, b_t = student_topk_logprobs[n], teacher_topk_logprobs[n]
        b_s = None if teacher_on_student_logprobs is None else teacher_on_student_logprobs[n]
        a_t = None if student_on_teacher_logprobs is None else student_on_teacher_logprobs[n]
        if strategy == "student":
            ids, valid, a, b = s, s >= 0, a_s, b_s
        elif strategy == "teacher":
            ids, valid, a, b = t, t >= 0, a_t, b_t
        elif strategy == "intersection":
            ids, valid = s, np.array([i >= 0 and i in t for i in s])
            a, b = a_s, np.array([b_t[list(t).index(i)] if i in t else 0.0 for i in s])
        else:
            ids, a, b = np.concatenate([s, t]), np.concatenate([a_s, a_t]), np.concatenate([b_s, b_t])
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


def sampled_drift(student_logprobs, teacher_logprobs, mask=None, *, max_log_ratio):
    return (student_logprobs - teacher_logprobs > max_log_ratio) & validity(mask, student_logprobs.shape)


def next_drift_count(drift_count, cu_seqlens=None, drift_count_in=None):
    flat = drift_count.reshape(-1)
    carried = []
    for b, response in enumerate(responses(drift_count.shape, cu_seqlens)):
        before = 0 if drift_count_in is None else drift_count_in[b]
        carried.append(flat[response[-1]] if len(response) else before)
    return np.array(carried, np.int32)
