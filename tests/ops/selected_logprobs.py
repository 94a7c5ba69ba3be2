import math

import numpy as np
import torch

import bad_input
import cases
from comparison import eager_logprobs
from gold import Sizes, by_logits_of, entropy, is_broken, logprobs, lse, put_gradient, validity

VARIANTS = [{}]
EXAMPLE = {}
RANDOM = {}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    ids, _ = cases.candidates(student, k, vocab_size, seed)
    return {"token_ids": ids}


def gold(into, a):
    shape, m = a.logits.shape[:-1], a.token_ids.shape[-1]
    out = {"logprobs": np.zeros((*shape, m)), "entropy": np.zeros(shape), "lse": np.zeros(shape)}
    gradient, sizes = np.zeros(a.logits.shape), Sizes("gradient")
    for n in np.argwhere(validity(a.mask, shape)):
        n = tuple(n)
        row = a.logits[n][: a.vocab_size].astype(np.float64)
        log_p, given = logprobs(row, a.temperature), a.token_ids[n] >= 0
        out["logprobs"][n][given] = log_p[a.token_ids[n][given]]
        out["entropy"][n], out["lse"][n] = entropy(log_p), lse(row, a.temperature)
        flows = given & (out["logprobs"][n] != -math.inf)
        coefficients, e = into["logprobs"][n][flows], into["entropy"][n]
        by_logits, magnitudes = by_logits_of(log_p, a.token_ids[n][flows], coefficients, np.abs(coefficients))
        exists = log_p != -math.inf
        p, x = np.exp(log_p[exists]), log_p[exists]
        by_logits[exists] -= e * p * (x + out["entropy"][n])
        magnitudes[exists] += np.abs(e * p) * (np.abs(x) + out["entropy"][n])
        asked = (coefficients != 0).any() or e != 0
        spoilt = math.nan if is_broken(row) else 0.0
        put_gradient(gradient[n], sizes, spoilt, by_logits, magnitudes, asked / a.temperature)
    return out | {"gradient": gradient}, sizes.of


def eager(gold, a):
    log_p = eager_logprobs(a.logits, a.temperature, a.vocab_size)
    p = log_p.exp()
    picked = log_p.gather(-1, a.token_ids.clamp(min=0).long())
    return {
        "logprobs": torch.where(a.token_ids < 0, 0.0, torch.where(picked == -torch.inf, -torch.inf, picked)),
        "entropy": -(p * log_p.where(p > 0, 0.0)).sum(-1),
        "lse": (a.logits.detach()[..., : a.vocab_size] / a.temperature).logsumexp(-1),
    }


READ_BACKWARDS = ["logits", "token_ids"]  # by the backward pass
BASE = {"logits": bad_input.zeros(2, 8, 64), "token_ids": bad_input.ids(2, 8, 16)}


def bad():
    yield from bad_input.logits("logits")
    yield from bad_input.ids_of_a_loss("token_ids", "m", 512)
    yield from bad_input.mask()
