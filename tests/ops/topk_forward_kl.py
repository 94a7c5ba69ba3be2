import math

import numpy as np
import torch

import bad_input
import cases
from comparison import eager_logprobs
from gold import Sizes, by_logits_of, filled, is_broken, logprobs, overlap, put_gradient, top, validity

TAILS = ["bucket", "generalised", "none"]
VARIANTS = [{}, {"logprob_min": -5.0, "tail": "none"}, {"tail": "generalised"}, {"logprob_min": -5.0}]
EXAMPLE = {}
RANDOM = {"logprob_min": [None, -12.345, -3.21], "tail": TAILS}
LEAST_REST = 2.0**-24


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    ids, log_q = cases.sent(teacher, k, temperatures[1], vocab_size)
    return {"teacher_topk_ids": ids, "teacher_topk_logprobs": log_q}


@np.errstate(invalid="ignore", over="ignore")
def gold(into, a):
    shape, k = a.student_logits.shape[:-1], a.teacher_topk_ids.shape[-1]
    valid = validity(a.mask, shape)
    measures = ["loss", "student_mass", "teacher_mass", "overlap", "overlap_token_advantage"]
    out = {name: np.zeros(shape) for name in measures} | {"student_topk_ids": np.zeros((*shape, k), np.int64)}
    out["student_topk_ids"][:] = np.arange(k)
    gradient, sizes = np.zeros(a.student_logits.shape), Sizes(*measures, "gradient")
    for n in np.ndindex(shape):
        if not valid[n]:
            continue
        row = a.student_logits[n][: a.vocab_size].astype(np.float64)
        log_p, students = logprobs(row, a.student_temperature), top(row, k)
        own = students[filled(students, row[students])]
        given = filled(a.teacher_topk_ids[n], a.teacher_topk_logprobs[n])
        ids, log_q = a.teacher_topk_ids[n][given], a.teacher_topk_logprobs[n][given].astype(np.float64)
        least = -math.inf if a.logprob_min is None else a.logprob_min
        columns = [of_candidate(log_p[i], b, least) for i, b in zip(ids, log_q, strict=True)]
        terms, coefficients, magnitudes = np.array(columns).reshape(-1, 3).T
        p, q = (np.exp(np.maximum(x, least)) for x in (log_p[ids], log_q))
        rest, slopes, size_of_rest, size_of_slopes = of_rest(p, q, a.tail)
        sizes_of_coefficients = np.abs(coefficients) + size_of_slopes * p
        coefficients = np.where(log_p[ids] < least, 0.0, coefficients + slopes)
        shared, broken = np.isin(ids, own), is_broken(row)
        out["student_topk_ids"][n] = students
        loss = math.nan if broken or np.isnan(terms).any() else terms.sum() + rest
        out["loss"][n] = 0.0 if loss < 0 and a.tail != "none" else loss
        out["student_mass"][n] = math.nan if broken else np.exp(log_p[ids]).sum()
        out["teacher_mass"][n] = np.exp(log_q).sum()
        out["overlap"][n] = 0.0 if broken else overlap(own, ids)
        mean = -terms[shared].sum() / shared.sum() if shared.any() else 0.0
        out["overlap_token_advantage"][n] = math.nan if broken else mean
        for name in ("student_mass", "teacher_mass"):
            sizes.put(name, out[name][n])
        sizes.put("overlap_token_advantage", magnitudes.sum())
        sizes.put("loss", magnitudes.sum() + size_of_rest)
        by_logits, magnitudes = by_logits_of(log_p, ids, coefficients, sizes_of_coefficients)
        scale = into["loss"][n] / a.student_temperature
        put_gradient(gradient[n], sizes, out["loss"][n], by_logits, magnitudes, scale)
    return out | {"gradient": gradient}, sizes.of


def of_candidate(log_p, log_q, least):
    """Loss, its derivative by log p, and the magnitudes that the loss adds up."""
    if math.isnan(log_p) or math.isnan(log_q):
        return math.nan, math.nan, 0.0
    a, b = max(log_p, least), max(log_q, least)
    if a == -math.inf:
        return math.inf, math.nan, 0.0
    q = np.exp(b)
    return q * (b - a), -q, q * (abs(a) + abs(b))


def of_rest(p, q, tail):
    """What the tail adds, its derivatives by the candidates' log p, and how an eps of log p counts in both."""
    if tail == "none":
        return 0.0, 0.0, 0.0, 0.0
    if tail == "generalised":
        return (p - q).sum(), p, (p + q).sum(), 1.0
    left = 1 - p.sum()
    p_r, q_r = max(left, LEAST_REST), max(1 - q.sum(), LEAST_REST)
    slope, amplified = q_r / p_r, 1 + p.sum() / p_r
    size = q_r * (abs(math.log(q_r)) + abs(math.log(p_r)) + amplified)
    return q_r * math.log(q_r / p_r), (slope if left > LEAST_REST else 0.0) * p, size, slope * amplified


def eager(gold, a):
    given = (a.teacher_topk_ids >= 0) & (a.teacher_topk_logprobs != -torch.inf)
    ids = a.teacher_topk_ids.clamp(min=0).long()
    log_p = eager_logprobs(a.student_logits, a.student_temperature, a.vocab_size).gather(-1, ids)
    log_p, log_q = (torch.where(given, x, -torch.inf) for x in (log_p, a.teacher_topk_logprobs))
    student_mass, teacher_mass = (x.exp().sum(-1) for x in (log_p, log_q))
    if a.logprob_min is not None:
        log_p, log_q = (torch.where(given, x.clamp(min=a.logprob_min), -torch.inf) for x in (log_p, log_q))
    p, q = log_p.exp(), log_q.exp()
    terms = torch.where(given, q * (log_q - log_p), 0.0)
    rest = {"none": torch.zeros(()), "generalised": (p - q).sum(-1)}
    p_r, q_r = ((1 - x.sum(-1)).clamp(min=LEAST_REST) for x in (p, q))
    rest["bucket"] = q_r * (q_r.log() - p_r.log())
    shared = (a.teacher_topk_ids[..., :, None] == torch.from_numpy(gold["student_topk_ids"])[..., None, :]).any(-1)
    return {
        "loss": terms.sum(-1) + rest[a.tail],
        "student_mass": student_mass,
        "teacher_mass": teacher_mass,
        "overlap_token_advantage": torch.where(shared, -terms, 0.0).sum(-1) / shared.sum(-1).clamp(min=1),
    }


READ_BACKWARDS = ["student_logits", "teacher_topk_ids"]  # by the backward pass
FLOAT32 = {"overlap"}  # even of float64 logits
BASE = {
    "student_logits": bad_input.zeros(2, 8, 64),
    "teacher_topk_ids": torch.arange(16).expand(2, 8, 16),
    "teacher_topk_logprobs": bad_input.zeros(2, 8, 16),
}


def bad():
    yield from bad_input.logits("student_logits")
    yield from bad_input.ids_of_a_loss("teacher_topk_ids", "k", 256)
    yield from bad_input.twice("teacher_topk_ids", "teacher_topk_logprobs")
    words = "teacher_topk_ids must have at most vocab_size = 15 candidates, got 16"
    yield {"student_logits": bad_input.zeros(2, 8, 15)}, words
    yield {"vocab_size": 15}, words
    yield from bad_input.floats("teacher_topk_logprobs", (2, 8, 16), (2, 8, 15), (16, 16))
    yield from bad_input.mask()
    yield {"tail": "x"}, "tail must be one of 'bucket', 'generalised', 'none', got 'x'"
    for value in (math.nan, math.inf):
        yield {"logprob_min": value}, f"logprob_min must be finite, got {value}"
