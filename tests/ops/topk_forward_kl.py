import math

import numpy as np
import torch

import bad_input
import cases
from comparison import eager_logprobs
from gold import Sizes, by_logits_of, is_broken, logprobs, put_gradient, top, validity

VARIANTS = [{}, {"logprob_min": -5.0}]
EXAMPLE = {}
RANDOM = {"logprob_min": [None, -12.345, -3.21]}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    ids, log_q = cases.sent(teacher, k, temperatures[1], vocab_size)
    return {"teacher_topk_ids": ids, "teacher_topk_logprobs": log_q}


def gold(upstream, a):
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
        given = a.teacher_topk_ids[n] >= 0
        ids, log_q = a.teacher_topk_ids[n][given], a.teacher_topk_logprobs[n][given].astype(np.float64)
        columns = [of_candidate(log_p[i], b, a.logprob_min) for i, b in zip(ids, log_q, strict=True)]
        terms, coefficients, magnitudes = np.array(columns).reshape(-1, 3).T
        shared, broken = np.isin(ids, students), is_broken(row)
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
        put_gradient(gradient[n], sizes, out["loss"][n], by_logits, magnitudes, upstream[n] / a.student_temperature)
    return out | {"gradient": gradient}, sizes.of


def of_candidate(log_p, log_q, logprob_min):
    """Loss, its derivative by log p, and the magnitudes that the loss adds up."""
    if math.isnan(log_p) or math.isnan(log_q):
        return math.nan, math.nan, 0.0
    a, b = (log_p, log_q) if logprob_min is None else (max(log_p, logprob_min), max(log_q, logprob_min))
    if b == -math.inf:
        return 0.0, 0.0, 0.0
    if a == -math.inf:
        return math.inf, math.nan, 0.0
    q = math.exp(b)
    return q * (b - a), 0.0 if logprob_min is not None and log_p < logprob_min else -q, q * (abs(a) + abs(b))


def eager(student_logits, a):
    given, ids = a.teacher_topk_ids >= 0, a.teacher_topk_ids.clamp(min=0).long()
    log_p = eager_logprobs(student_logits, a.student_temperature, a.vocab_size).gather(-1, ids)
    log_q = torch.where(given, a.teacher_topk_logprobs, -torch.inf)
    student_mass, teacher_mass = (torch.where(given, x.exp(), 0.0).sum(-1) for x in (log_p, log_q))
    if a.logprob_min is not None:
        log_p, log_q = log_p.clamp(min=a.logprob_min), log_q.clamp(min=a.logprob_min)
    terms = torch.where(given & (log_q > -torch.inf), log_q.exp() * (log_q - log_p), 0.0)
    first = cases.top(student_logits.detach(), ids.shape[-1], a.vocab_size)
    shared = (a.teacher_topk_ids[..., :, None] == first[..., None, :]).any(-1)
    return {
        "loss": terms.sum(-1),
        "student_mass": student_mass,
        "teacher_mass": teacher_mass,
        "overlap_token_advantage": torch.where(shared, -terms, 0.0).sum(-1) / shared.sum(-1).clamp(min=1),
    }


READ_BACKWARDS = ["student_logits", "teacher_topk_ids"]  # by the backward pass
FLOAT32 = {"overlap"}  # even of float64 logits
BASE = {
    "student_logits": bad_input.zeros(2, 8, 64),
    "teacher_topk_ids": bad_input.ids(2, 8, 16),
    "teacher_topk_logprobs": bad_input.zeros(2, 8, 16),
}


def bad():
    yield from bad_input.logits("student_logits")
    yield from bad_input.ids_of_a_loss("teacher_topk_ids", "k", 256)
    words = "teacher_topk_ids must have at most vocab_size = 15 candidates, got 16"
    yield {"student_logits": bad_input.zeros(2, 8, 15)}, words
    yield {"vocab_size": 15}, words
    yield from bad_input.floats("teacher_topk_logprobs", (2, 8, 16), (2, 8, 15), (16, 16))
    yield from bad_input.mask()
    for value in (math.nan, math.inf):
        yield {"logprob_min": value}, f"logprob_min must be finite, got {value}"
