import math
from types import SimpleNamespace

import numpy as np
import torch

import bad_input
import reliability_from_drift
import token_stats
from comparison import EXACT, eager_logprobs, greatest
from gold import candidate_rewards, candidate_weights, filled, nucleus, rows, validity

# A metric and a reward weight meet each other at least once; the full product would only cost time.
COMMON = {"w_drop": 0.2, "threshold": 0.5}
VARIANTS = [
    COMMON | {"metric": "overlap", "reward_weight": "student"},
    COMMON | {"metric": "top_p", "top_p": 0.83, "reward_weight": "teacher"},
    COMMON | {"metric": "overlap", "reward_weight": "none"},
]
EXAMPLE = {"metric": "top_p", "w_drop": 0.1}
RANDOM = {
    "metric": ["overlap", "top_p"],
    "reward_weight": ["student", "teacher", "none"],
    "threshold": [0.7, 1e-9, 1.0],
    "top_p": [0.95, 0.5],
    "w_drop": [0.3, 1.0],
    "w_base": [0.5, 0.0],
}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    return {}


def gold(a):
    shape = a.student_logits.shape[:-1]
    stats, _ = token_stats.gold(a)
    valid = validity(a.mask, shape).reshape(-1)
    broken = np.isnan(stats["student_entropy"] + stats["teacher_entropy"]).reshape(-1)
    drift = np.zeros(valid.size, bool)
    for n in np.flatnonzero(valid):
        if a.metric == "overlap":
            drift[n] = stats["overlap"].reshape(-1)[n] < a.threshold
        else:
            ids = nucleus(rows(stats["teacher_topk_ids"])[n], rows(stats["teacher_topk_logprobs"])[n], a.top_p)
            drift[n] = broken[n] or a.token_ids.reshape(-1)[n] not in ids
    drift = drift.reshape(shape)
    scan, _ = reliability_from_drift.gold(SimpleNamespace(**vars(a) | {"drift": drift}))
    weight, rewards = weight_of(scan, a).reshape(-1), np.zeros((valid.size, a.k))
    magnitudes = np.zeros_like(rewards)  # what is subtracted: no float32 is closer
    for n in np.flatnonzero(valid & (weight != 0)):
        log_p = rows(stats["student_topk_logprobs"])[n]
        log_q = rows(stats["teacher_on_student_logprobs"])[n]
        slots = filled(rows(stats["student_topk_ids"])[n], log_p)
        if broken[n]:
            rewards[n, slots] = math.nan
            continue
        log_p, log_q = log_p[slots], log_q[slots]
        w = candidate_weights(log_p, log_q, a.reward_weight)
        rewards[n, slots] = weight[n] * candidate_rewards(log_p, log_q, w)
        if w is not None:
            both = [np.where(np.isfinite(x), x, 0.0) for x in (log_p, log_q)]
            magnitudes[n, slots] = abs(weight[n]) * w * np.abs(both).max(0)
    values = {"overlap": stats["overlap"], "drift": drift, **scan, "topk_ids": stats["student_topk_ids"]}
    rewards, magnitudes = (x.reshape((*shape, a.k)) for x in (rewards, magnitudes))
    size = max(greatest(magnitudes), greatest(rewards))
    return values | {"rewards": rewards}, {"rewards": size, "magnitudes": magnitudes}


def weight_of(scan, a):
    """What rewards are multiplied by: L, or what `opd_loss` has been given."""
    return scan["weight"].astype(np.float32) if getattr(a, "weight", None) is None else a.weight


def eager(gold, a):
    ids = torch.from_numpy(gold["topk_ids"])
    log_p = eager_logprobs(a.student_logits.detach(), a.student_temperature, a.vocab_size).gather(-1, ids)
    log_q = eager_logprobs(a.teacher_logits, a.teacher_temperature, a.vocab_size).gather(-1, ids)
    exists = log_p != -torch.inf
    w = {"student": log_p.softmax(-1), "teacher": log_q.where(exists, -torch.inf).softmax(-1)}
    w = w | {"none": 1 / exists.sum(-1, keepdim=True)}
    weight = torch.as_tensor(weight_of(gold, a)).float()[..., None]
    return {"rewards": torch.where(exists, weight * w[a.reward_weight] * (log_q - log_p), 0.0)}


FLOAT32 = EXACT  # even of float64 logits
BASE = token_stats.BASE


def bad():
    ids = bad_input.ids
    too_few = ((3,), (1, 2, 3, 4), ())
    names = "student_logits", "teacher_logits"
    yield from bad_input.logits(*names, shape="[B, T, V] or [N, V]", too_few=too_few)
    yield from bad_input.number_of_candidates()
    yield from bad_input.mask()
    yield from bad_input.token_ids()
    yield from bad_input.metric()
    yield {"reward_weight": "x"}, "reward_weight must be one of 'student', 'teacher', 'none', got 'x'"
    yield {"metric": "top_p"}, "token_ids must be given when metric is 'top_p', got None"
    for value in (64, -1, 2**40):
        words = f"token_ids must be between 0 and vocab_size - 1 = 63 where the position is valid, got {value}"
        yield {"metric": "top_p", "token_ids": ids(2, 8) + value}, words
    packed = {name: bad_input.zeros(16, 64) for name in names}
    yield from bad_input.responses(packed, "student_logits", "are", ", V")
    # Which of two comes first: tensors in the order of the signature, then scalars, then values.
    mask = bad_input.zeros(8)
    wrong = {"student_logits": ids(2, 8, 64), "mask": mask, "k": 0}
    yield wrong, f"student_logits must have dtype {bad_input.LOGITS}, got int64", TypeError
    yield {"mask": mask, "k": 0, "threshold": 2.0}, "mask must have shape [2, 8], got [8]"
    wrong = {"k": 0, "threshold": 2.0, "w_drop": -1.0, "drift_count": bad_input.i32(0, -1)}
    yield wrong, "k must be between 1 and min(vocab_size, 256) = 64, got 0"
    yield wrong | {"k": 1}, "threshold must be in (0, 1], got 2.0"
