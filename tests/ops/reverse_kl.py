import math

import numpy as np
import torch

import bad_input
import cases
from comparison import eager_logprobs
from gold import Sizes, entropy, kl, logprobs, put_gradient, validity

VARIANTS = [{"weight": None}, {}]
EXAMPLE = {}
RANDOM = {}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    """Weights of either sign; none is 0, for such a position is as good as masked."""
    weight = torch.rand(student.shape[:-1], generator=cases.generator(seed)) + 0.5
    return {"weight": torch.where(weight < 0.7, -weight, weight)}


def gold(into, a):
    shape = a.student_logits.shape[:-1]
    valid = validity(a.mask, shape)
    loss, gradient, sizes = np.zeros(shape), np.zeros(a.student_logits.shape), Sizes("loss", "gradient")
    for n in np.ndindex(shape):
        w = 1.0 if a.weight is None else float(a.weight[n])
        if not valid[n] or w == 0:
            continue
        log_p = logprobs(a.student_logits[n][: a.vocab_size].astype(np.float64), a.student_temperature)
        log_q = logprobs(a.teacher_logits[n][: a.vocab_size].astype(np.float64), a.teacher_temperature)
        divergence = kl(log_p, log_q)
        loss[n] = w * divergence
        by_logits, magnitudes = np.zeros(len(log_p)), np.zeros(len(log_p))
        if math.isfinite(divergence):
            exists = log_p > -math.inf
            sizes.put("loss", w * (divergence + entropy(log_p)))  # the cross entropy, which it is a part of
            p, x, y = np.exp(log_p[exists]), log_p[exists], log_q[exists]
            by_logits[exists] = p * (x - y - divergence)
            magnitudes[exists] = p * (np.abs(x) + np.abs(y) + divergence)
        scale = into["loss"][n] * w / a.student_temperature if into["loss"][n] else 0.0
        put_gradient(gradient[n], sizes, loss[n], by_logits, magnitudes, scale)
    return {"loss": loss, "gradient": gradient}, sizes.of


def eager(gold, a):
    log_p = eager_logprobs(a.student_logits, a.student_temperature, a.vocab_size)
    log_q = eager_logprobs(a.teacher_logits, a.teacher_temperature, a.vocab_size)
    divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return {"loss": divergence if a.weight is None else a.weight * divergence}


READ_BACKWARDS = ["student_logits", "teacher_logits", "mask", "weight"]  # by the backward pass
BASE = {"student_logits": bad_input.zeros(2, 8, 64), "teacher_logits": bad_input.zeros(2, 8, 64)}


def bad():
    yield from bad_input.logits("student_logits", "teacher_logits")
    yield from bad_input.mask()
    yield from bad_input.floats("weight", (2, 8), (2, 7), (2, 8, 1), dtype=torch.bool)
