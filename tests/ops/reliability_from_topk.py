from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import torch

import bad_input
import cases
import reliability_from_drift
from gold import filled, nucleus, overlap, rows, validity

# Of logits only the candidates are left: these have some that tie, that are impossible, that are padding.
CASES = "random ties nan_many minus_inf_some minus_inf_disjoint equal_pair k_1 k_10 k_64 k_256 k_is_v_16".split()
VARIANTS = [{}, {"metric": "top_p", "top_p": 0.83}]
EXAMPLE = {"metric": "top_p", "w_drop": 0.1}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    ids, log_q = cases.sent(teacher, k, temperatures[1], vocab_size)
    own, log_p = cases.sent(student, k, temperatures[0], vocab_size, with_padding=False)
    return {
        "student_topk_ids": own,
        "teacher_topk_ids": ids,
        "student_topk_logprobs": log_p,
        "teacher_topk_logprobs": log_q,
    }


@st.composite
def problems(draw):
    """Ids as they come from outside: any order, padding; NaN at the padding; impossible ones."""
    rng = cases.generator(draw(st.integers(0, 2**31)))
    k = draw(st.sampled_from([1, 2, 5, 8, 16, 17, 64, 200, 256]))
    shape = draw(st.sampled_from([(2, 5), (1, 1), (3, 4)]))
    positions, padding = shape[0] * shape[1], draw(st.sampled_from([0.0, 0.3, 1.0]))
    far = draw(st.sampled_from([0, 2**31, 2**40]))  # ids that differ above their lower 32 bits only
    below = draw(st.sampled_from([k, 2 * k]))
    student, teacher = (random_ids(rng, positions, k, below, padding) for _ in range(2))
    student = torch.where((student >= 0) & (student % 3 == 0), student + far, student)
    teacher = torch.where((teacher >= 0) & (teacher % 2 == 0), teacher + far, teacher)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))

    def logprobs(ids, nan):
        x = (torch.randn(positions, k, generator=rng) * 2).log_softmax(-1) - 0.02
        x[torch.rand(positions, k, generator=rng) < 0.1] = -torch.inf
        x = torch.where(ids < 0, torch.nan, x)
        x[torch.rand(positions, k, generator=rng) < nan] = torch.nan
        return x.view(*shape, k).to(dtype)

    tokens = teacher.gather(1, torch.randint(k, (positions, 1), generator=rng))
    narrow = [torch.int64] if far else [torch.int32, torch.int64]
    return {
        "student_topk_ids": student.view(*shape, k).to(draw(st.sampled_from(narrow))),
        "teacher_topk_ids": teacher.view(*shape, k).to(draw(st.sampled_from(narrow))),
        "mask": (torch.rand(shape, generator=rng) < 0.8) if draw(st.booleans()) else None,
        "student_topk_logprobs": logprobs(student, 0.1) if draw(st.booleans()) else None,
        "teacher_topk_logprobs": logprobs(teacher, draw(st.sampled_from([0.0, 0.02]))),
        "token_ids": tokens.view(shape).to(draw(st.sampled_from(narrow))),
        "metric": draw(st.sampled_from(["overlap", "top_p"])),
        "threshold": draw(st.sampled_from([0.7, 0.5, 1.0, 1e-9, 1 / 3])),
        "top_p": draw(st.sampled_from([0.95, 0.8, 0.3, 1.0])),
        "w_drop": draw(st.sampled_from([0.01, 0.4])),
    }


def random_ids(rng, positions, k, below, padding):
    """[positions, k] distinct ids; a share of them replaced by padding."""
    ids = torch.stack([torch.randperm(below, generator=rng)[:k] for _ in range(positions)])
    is_padding = torch.rand(positions, k, generator=rng) < padding
    return torch.where(is_padding, torch.randint(-9, 0, (positions, k), generator=rng), ids)


def gold(a):
    shape = a.student_topk_ids.shape[:-1]
    student, teacher = rows(a.student_topk_ids), rows(a.teacher_topk_ids)
    log_p, log_q = (None if x is None else rows(x) for x in (a.student_topk_logprobs, a.teacher_topk_logprobs))
    overlaps, drift = np.zeros(len(student)), np.zeros(len(student), bool)
    for n in np.flatnonzero(validity(a.mask, shape)):
        s, t = ((ids[n], None if x is None else x[n]) for ids, x in ((student, log_p), (teacher, log_q)))
        overlaps[n] = overlap(s[0][filled(*s)], t[0][filled(*t)])
        if a.metric == "overlap":
            drift[n] = overlaps[n] < a.threshold
        else:
            drift[n] = a.token_ids.reshape(-1)[n] not in nucleus(*t, a.top_p)
    drift = drift.reshape(shape)
    scan, sizes = reliability_from_drift.gold(SimpleNamespace(**vars(a) | {"drift": drift}))
    return {"overlap": overlaps.reshape(shape), "drift": drift, **scan}, sizes


eager = reliability_from_drift.eager

BASE = dict.fromkeys(["student_topk_ids", "teacher_topk_ids"], torch.arange(16).expand(2, 8, 16))


def bad():
    ids, zeros = bad_input.ids, bad_input.zeros
    for shape in ((16,), (2, 2, 8, 16), (2, 8, 0), (2, 8, 257)):
        words = f"student_topk_ids must have shape [B, T, k] or [N, k] with 1 <= k <= 256, got {list(shape)}"
        yield {"student_topk_ids": ids(*shape)}, words
    for shape in ((2, 8, 15), (16, 16)):
        yield {"teacher_topk_ids": ids(*shape)}, f"teacher_topk_ids must have shape [2, 8, 16], got {list(shape)}"
    yield (
        {"student_topk_ids": zeros(2, 8, 16)},
        "student_topk_ids must have dtype int32 or int64, got float32",
        TypeError,
    )
    yield from bad_input.dtypes_of_ids("teacher_topk_ids", (2, 8, 16))
    for side in ("student", "teacher"):
        yield from bad_input.floats(f"{side}_topk_logprobs", (2, 8, 16), (2, 8, 15), (16, 16))
        yield from bad_input.twice(f"{side}_topk_ids", f"{side}_topk_logprobs")
    yield from bad_input.mask()
    yield from bad_input.token_ids()
    yield from bad_input.metric()
    words = "must be given when metric is 'top_p', got None"
    yield {"metric": "top_p", "teacher_topk_logprobs": zeros(2, 8, 16)}, f"token_ids {words}"
    yield {"metric": "top_p", "token_ids": ids(2, 8)}, f"teacher_topk_logprobs {words}"
    packed = {name: x.flatten(0, 1) for name, x in BASE.items()}
    yield from bad_input.responses(packed, "student_topk_ids", "are", ", k")
