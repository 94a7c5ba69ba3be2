import hypothesis.strategies as st
import numpy as np
import torch

import bad_input
import cases
from gold import responses, validity

CASES = []  # problems() has them all
VARIANTS = [{}]
EXAMPLE = {"w_drop": 0.1}


def tensors(student, teacher, k, seed, temperatures, vocab_size):
    return {"drift": torch.rand(student.shape[:-1], generator=cases.generator(seed)) < 0.5}


@st.composite
def problems(draw):
    """Padded or packed, some of it empty."""
    batch, packed = draw(st.integers(0, 4)), draw(st.booleans())
    rng = cases.generator(draw(st.integers(0, 2**31)))
    if packed:
        lengths = torch.randint(0, 5, (batch,), generator=rng) * torch.randint(0, 20, (batch,), generator=rng)
        starts, shape = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), (int(lengths.sum()),)
    else:
        starts, shape = None, (batch, draw(st.integers(0, 70)))
    return {
        "drift": torch.rand(shape, generator=rng) < draw(st.sampled_from([0.1, 0.5, 1.0])),
        "mask": (torch.rand(shape, generator=rng) < 0.7) if draw(st.booleans()) else None,
        "cu_seqlens": starts,
        "drift_count": torch.randint(0, 40, (batch,), generator=rng).int() if draw(st.booleans()) else None,
        "w_drop": draw(st.sampled_from([0.01, 0.0, 0.3, 1.0, 7.5, 1 / 3])),
        "w_base": draw(st.sampled_from([0.5, 0.0, 0.1])),
        "eps": draw(st.sampled_from([1e-8, 0.0, 0.5])),
    }


def gold(a):
    shape = a.drift.shape
    drift, valid = a.drift.reshape(-1), validity(a.mask, shape).reshape(-1)
    all_responses = responses(shape, a.cu_seqlens)
    count, kept, weight = np.zeros(drift.size, np.int64), np.zeros(drift.size), np.zeros(drift.size)
    effective_length = np.zeros(len(all_responses), np.int64)
    for b, response in enumerate(all_responses):
        drifted = 0 if a.drift_count is None else int(a.drift_count[b])
        for n in response:
            drifted = min(drifted + bool(valid[n] and drift[n]), 2**31 - 1)
            count[n] = drifted
            if valid[n]:
                kept[n] = min(max(1.0 - float(a.w_drop) * drifted, 0.0), 1.0)
                weight[n] = kept[n] + a.w_base
                effective_length[b] += kept[n] > a.eps
    per_position = {"drift_count": count, "reliability": kept, "weight": weight}
    values = {name: x.reshape(shape) for name, x in per_position.items()} | {"effective_length": effective_length}
    return values, {}


def eager(gold, a):
    return {}  # all of it is exact


BASE = {"drift": bad_input.zeros(2, 8, dtype=torch.bool)}


def bad():
    for shape in ((), (2, 8, 1)):
        yield {"drift": bad_input.zeros(*shape) > 0}, f"drift must have shape [B, T] or [N], got {list(shape)}"
    yield {"drift": bad_input.ids(2, 8)}, "drift must have dtype bool, got int64", TypeError
    yield {"drift": 3}, "drift must be a tensor, got int", TypeError
    yield from bad_input.mask()
    yield from bad_input.responses({"drift": bad_input.zeros(16) > 0}, "drift", "is", "")
