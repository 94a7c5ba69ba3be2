import math

import numpy as np
import torch

import bad_input
from comparison import eager_logprobs, greatest
from gold import entropy, filled, is_broken, kl, logprobs, lse, overlap, top, validity

VARIANTS = [{}]
EXAMPLE = {}
RANDOM = {}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    return {}


def gold(a):
    shape = a.student_logits.shape[:-1]
    valid, positions = validity(a.mask, shape), []
    for n in np.ndindex(shape):
        x, y = (logits[n][: a.vocab_size].astype(np.float64) for logits in (a.student_logits, a.teacher_logits))
        token = -1 if a.token_ids is None else a.token_ids[n]
        out = of_position(x, y, token, a.k, a.student_temperature, a.teacher_temperature) if valid[n] else {}
        positions.append(out)
    masked = {name: np.zeros(a.k if "topk" in name or name.endswith("logprobs") else ()) for name in FIELDS}
    masked |= {name: np.arange(a.k) for name in FIELDS if name.endswith("ids")}
    values = {name: np.array([(out or masked)[name] for out in positions]) for name in FIELDS}
    values = {name: array.reshape(shape + array.shape[1:]) for name, array in values.items()}
    sizes = {  # of a divergence: the cross entropy, which the entropy is subtracted from
        "reverse_kl": greatest(values["reverse_kl"] + values["student_entropy"]),
        "forward_kl": greatest(values["forward_kl"] + values["teacher_entropy"]),
    }
    return values, sizes


FIELDS = (
    "student_topk_ids student_topk_logprobs teacher_topk_ids teacher_topk_logprobs teacher_on_student_logprobs "
    "student_on_teacher_logprobs overlap student_lse teacher_lse student_entropy teacher_entropy reverse_kl forward_kl "
    "student_token_logprob teacher_token_logprob"
).split()


def of_position(x, y, token, k, student_temperature, teacher_temperature):
    log_p, log_q = logprobs(x, student_temperature), logprobs(y, teacher_temperature)
    s, t = top(x, k), top(y, k)
    exists = 0 <= token < len(x)
    return {
        "student_topk_ids": s,
        "student_topk_logprobs": log_p[s],
        "teacher_topk_ids": t,
        "teacher_topk_logprobs": log_q[t],
        "teacher_on_student_logprobs": log_q[s],
        "student_on_teacher_logprobs": log_p[t],
        "overlap": 0.0 if is_broken(x) or is_broken(y) else overlap(s[filled(s, x[s])], t[filled(t, y[t])]),
        "student_lse": lse(x, student_temperature),
        "teacher_lse": lse(y, teacher_temperature),
        "student_entropy": entropy(log_p),
        "teacher_entropy": entropy(log_q),
        "reverse_kl": kl(log_p, log_q),
        "forward_kl": kl(log_q, log_p),
        "student_token_logprob": log_p[token] if exists else math.nan,
        "teacher_token_logprob": log_q[token] if exists else math.nan,
    }


def eager(gold, a):
    """At the candidates that the gold names."""
    student, teacher = a.student_logits.detach()[..., : a.vocab_size], a.teacher_logits[..., : a.vocab_size]
    log_p = eager_logprobs(student, a.student_temperature, a.vocab_size)
    log_q = eager_logprobs(teacher, a.teacher_temperature, a.vocab_size)
    s, t = torch.from_numpy(gold["student_topk_ids"]), torch.from_numpy(gold["teacher_topk_ids"])
    token = torch.zeros(s.shape[:-1], dtype=torch.int64) if a.token_ids is None else a.token_ids.long()
    token = token.clamp(0, a.vocab_size - 1)[..., None]
    return {
        "student_topk_logprobs": log_p.gather(-1, s),
        "teacher_topk_logprobs": log_q.gather(-1, t),
        "teacher_on_student_logprobs": log_q.gather(-1, s),
        "student_on_teacher_logprobs": log_p.gather(-1, t),
        "student_lse": (student / a.student_temperature).logsumexp(-1),
        "teacher_lse": (teacher / a.teacher_temperature).logsumexp(-1),
        **eager_sums(a),
        "student_token_logprob": log_p.gather(-1, token)[..., 0],
        "teacher_token_logprob": log_q.gather(-1, token)[..., 0],
    }


def eager_sums(a):
    log_p = eager_logprobs(a.student_logits.detach(), a.student_temperature, a.vocab_size)
    log_q = eager_logprobs(a.teacher_logits, a.teacher_temperature, a.vocab_size)
    return {
        "student_entropy": expectation(log_p, -log_p),
        "teacher_entropy": expectation(log_q, -log_q),
        "reverse_kl": expectation(log_p, log_p - log_q),
        "forward_kl": expectation(log_q, log_q - log_p),
    }


def expectation(logprobs, of):
    p = logprobs.exp()
    return torch.where(p > 0, p * of, 0.0).sum(-1)


BASE = {"student_logits": bad_input.zeros(2, 8, 64), "teacher_logits": bad_input.zeros(2, 8, 64)}


def bad():
    yield from bad_input.logits("student_logits", "teacher_logits")
    yield from bad_input.number_of_candidates()
    yield from bad_input.mask()
    yield from bad_input.token_ids()
