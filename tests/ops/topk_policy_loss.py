import math

import numpy as np
import torch

import bad_input
import cases
from comparison import eager_logprobs
from gold import Sizes, UndecidedError, by_logits_of, logprobs, put_gradient, validity

NEAR = 1e-4  # ratios this close to a bound may fall on either side of it
VARIANTS = [{"old_logprobs": None}, {"clip_high": 0.28}]
EXAMPLE = {}
RANDOM = {"clip_low": [0.2, 0.0, 1.0], "clip_high": [0.28, 1e30], "clip_dual": [3.0, 1.25, math.inf]}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    ids, advantages = cases.candidates(student, k, vocab_size, seed)
    old = cases.moved(student, ids, temperatures[0], vocab_size, seed)
    return {"topk_ids": ids, "advantages": advantages, "old_logprobs": old}


def gold(into, a):
    shape = a.student_logits.shape[:-1]
    valid = validity(a.mask, shape)
    loss, gradient, sizes = np.zeros(shape), np.zeros(a.student_logits.shape), Sizes("loss", "gradient")
    for n in np.ndindex(shape):
        counting = np.flatnonzero((a.topk_ids[n] >= 0) & (a.advantages[n] != 0))
        if not valid[n] or len(counting) == 0:
            continue
        log_p = logprobs(a.student_logits[n][: a.vocab_size].astype(np.float64), a.student_temperature)
        ids, terms, coefficients, amplified = a.topk_ids[n][counting], [], [], []
        for j, i in zip(counting, ids, strict=True):
            if log_p[i] == -math.inf:
                term = 0.0, 0.0
            else:
                log_ratio = log_p[i] * 0.0 if a.old_logprobs is None else log_p[i] - float(a.old_logprobs[n][j])
                term = of_candidate(float(a.advantages[n][j]), log_ratio, a.clip_low, a.clip_high, a.clip_dual)
            terms.append(term[0]), coefficients.append(term[1])
            # A relative eps of log p is one of the ratio so many times.
            amplified.append(1.0 if a.old_logprobs is None or log_p[i] == -math.inf else 1.0 + abs(log_p[i]))
        loss[n] = sum(terms)
        sizes.put("loss", (np.abs(terms) * amplified).sum())
        by_logits, magnitudes = by_logits_of(log_p, ids, np.array(coefficients), np.abs(coefficients) * amplified)
        put_gradient(gradient[n], sizes, loss[n], by_logits, magnitudes, into["loss"][n] / a.student_temperature)
    return {"loss": loss, "gradient": gradient}, sizes.of


def of_candidate(advantage, log_ratio, clip_low, clip_high, clip_dual):
    """Loss, and its derivative by log p."""
    ratio = math.exp(min(max(log_ratio, -20.0), 20.0)) if not math.isnan(log_ratio) else math.nan
    if math.isnan(ratio) or math.isnan(advantage):
        return math.nan, math.nan
    for bound in (1 - clip_low, 1 + clip_high, clip_dual):
        if log_ratio != 0 and abs(ratio - bound) <= NEAR * bound and bound != math.inf:
            raise UndecidedError("a ratio lies on a bound")
    unclipped = -advantage * ratio
    clipped = -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high)
    if advantage < 0 and max(unclipped, clipped) > -advantage * clip_dual:
        return -advantage * clip_dual, 0.0
    if clipped > unclipped:
        return clipped, 0.0
    return unclipped, 0.0 if abs(log_ratio) > 20 else unclipped


def eager(gold, a):
    """As in PPO."""
    logprobs = eager_logprobs(a.student_logits, a.student_temperature, a.vocab_size)
    logprobs = logprobs.gather(-1, a.topk_ids.clamp(min=0).long())
    old = logprobs.detach() if a.old_logprobs is None else a.old_logprobs
    ratio = (logprobs - old).clamp(-20, 20).exp()
    terms = torch.maximum(-a.advantages * ratio, -a.advantages * ratio.clamp(1 - a.clip_low, 1 + a.clip_high))
    terms = torch.where(a.advantages < 0, torch.minimum(terms, -a.advantages * a.clip_dual), terms)
    counts = (a.topk_ids >= 0) & (a.advantages != 0) & (logprobs != -torch.inf)
    return {"loss": torch.where(counts, terms, 0.0).sum(-1)}


READ_BACKWARDS = ["student_logits", "topk_ids"]  # by the backward pass
BASE = {
    "student_logits": bad_input.zeros(2, 8, 64),
    "topk_ids": bad_input.ids(2, 8, 16),
    "advantages": bad_input.zeros(2, 8, 16),
}


def bad():
    yield from bad_input.logits("student_logits")
    yield from bad_input.ids_of_a_loss("topk_ids", "m", 512)
    yield from bad_input.floats("advantages", (2, 8, 16), (2, 8), (16, 16))
    yield from bad_input.floats("old_logprobs", (2, 8, 16), (2, 8, 15))
    yield from bad_input.mask()
    for value in (-0.1, 1.1, math.nan):
        yield {"clip_low": value}, f"clip_low must be in [0, 1], got {value}"
    for value in (-0.1, math.nan, math.inf):
        yield {"clip_high": value}, f"clip_high must be finite and >= 0, got {value}"
    for value in (1.0, math.nan):
        yield {"clip_dual": value}, f"clip_dual must be > 1, got {value}"
