from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import comparison
import gold
from implementations import every_compiled, every_implementation


def check(result, *args, **kwargs):
    arrays = [x if x is None else x.numpy() for x in args]
    kwargs = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    comparison.check(result, gold.reliability_from_drift(*arrays, **kwargs), {})


@st.composite
def problems(draw):
    """drift, mask, and the arguments of a padded or packed problem."""
    batch = draw(st.integers(0, 4))
    packed = draw(st.booleans())
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if packed:
        lengths = torch.randint(0, 5, (batch,), generator=rng) * torch.randint(0, 20, (batch,), generator=rng)
        cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        shape = (int(lengths.sum()),)
    else:
        cu_seqlens, shape = None, (batch, draw(st.integers(0, 70)))
    drift = torch.rand(shape, generator=rng) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    mask = (torch.rand(shape, generator=rng) < 0.7) if draw(st.booleans()) else None
    kwargs = {
        "cu_seqlens": cu_seqlens,
        "drift_count": torch.randint(0, 40, (batch,), generator=rng).int() if draw(st.booleans()) else None,
        "w_drop": draw(st.sampled_from([0.01, 0.0, 0.3, 1.0, 7.5, 1 / 3])),
        "w_base": draw(st.sampled_from([0.5, 0.0, 0.1])),
        "eps": draw(st.sampled_from([1e-8, 0.0, 0.5])),
    }
    return drift, mask, kwargs


@every_implementation
@hypothesis.given(problem=problems())
def test_against_gold(impl, problem):
    drift, mask, kwargs = problem
    check(impl.reliability_from_drift(drift, mask, **kwargs), drift, mask, **kwargs)


@every_implementation
@hypothesis.given(problem=problems(), at=st.floats(0, 1))
def test_chunks_with_the_carry_equal_the_whole(impl, problem, at):
    drift, mask, kwargs = problem
    hypothesis.assume(drift.dim() == 2)
    whole = impl.reliability_from_drift(drift, mask, **kwargs)
    cut = int(at * drift.shape[1])
    first = impl.reliability_from_drift(drift[:, :cut], None if mask is None else mask[:, :cut], **kwargs)
    if cut:
        kwargs["drift_count"] = first.drift_count[:, -1]  # a stride that is not 1
    second = impl.reliability_from_drift(drift[:, cut:], None if mask is None else mask[:, cut:], **kwargs)
    for name in ("drift_count", "reliability", "weight"):
        joined = torch.cat([getattr(first, name), getattr(second, name)], 1)
        assert torch.equal(joined, getattr(whole, name)), name
    assert torch.equal(first.effective_length + second.effective_length, whole.effective_length)


@every_implementation
@hypothesis.given(problem=problems())
def test_packed_equals_padded(impl, problem):
    drift, mask, kwargs = problem
    hypothesis.assume(drift.dim() == 2)
    padded = impl.reliability_from_drift(drift, mask, **kwargs)
    kwargs["cu_seqlens"] = (torch.arange(len(drift) + 1) * drift.shape[1]).int()
    packed = impl.reliability_from_drift(drift.reshape(-1), None if mask is None else mask.reshape(-1), **kwargs)
    assert comparison.differing(packed, packed._make([*(x.reshape(-1) for x in padded[:3]), padded[3]])) == []


W_DROPS = [0.01, 0.001, 1 / 3, 1 / 7, 1 / 49, 0.0007]


@every_implementation
@pytest.mark.parametrize("w_drop", W_DROPS)
def test_every_count_up_to_many_is_rounded_as_defined(impl, w_drop):
    """R = 1 - w_drop * C with the product rounded before the difference."""
    drift = torch.ones(1, 2000, dtype=torch.bool)
    kwargs = {"w_drop": w_drop, "w_base": 0.1, "eps": 0.0}
    check(impl.reliability_from_drift(drift, **kwargs), drift, None, **kwargs)


def test_a_fused_multiply_add_would_show():
    """It gives R other bits for some of those counts: computed here in fractions, rounded once."""
    for w_drop in W_DROPS:
        fused = [max(float(1 - Fraction(w_drop) * c), 0.0) for c in range(2000)]
        defined = [max(1.0 - w_drop * c, 0.0) for c in range(2000)]
        if not np.array_equal(np.float32(fused), np.float32(defined)):
            return
    raise AssertionError("the test above cannot fail")


@every_implementation
def test_effective_length_counts_the_unrounded_reliability(impl):
    """At C = 10, 1 - 0.1 * C is 0 exactly; at w_drop = 1/3 and C = 3 too. eps is compared in float64."""
    drift = torch.ones(1, 12, dtype=torch.bool)
    assert impl.reliability_from_drift(drift, w_drop=0.1, eps=0.0).effective_length.tolist() == [9]
    assert impl.reliability_from_drift(drift, w_drop=1 / 3, eps=0.0).effective_length.tolist() == [2]
    assert impl.reliability_from_drift(drift, w_drop=0.0, eps=1.0).effective_length.tolist() == [0]
    eps = 1.0 - 0.01 * 5
    assert impl.reliability_from_drift(drift, w_drop=0.01, eps=eps).effective_length.tolist() == [4]
    assert impl.reliability_from_drift(drift, w_drop=0.01, eps=np.nextafter(eps, 0)).effective_length.tolist() == [5]


@every_implementation
def test_extreme_scalars(impl):
    drift = torch.ones(2, 20, dtype=torch.bool)
    for kwargs in ({"w_drop": 1e308}, {"w_drop": 5e-324}, {"w_base": 1e308}, {"w_base": 1e-50}, {"eps": 1e308}):
        with np.errstate(over="ignore"):
            check(impl.reliability_from_drift(drift, **kwargs), drift, None, **kwargs)


@every_implementation
def test_large_counts_carried_in(impl):
    drift = torch.ones(3, 4, dtype=torch.bool)
    carried = torch.tensor([0, 2**24, 2**31 - 5], dtype=torch.int32)  # 2**24 + 1 is no float32
    result = impl.reliability_from_drift(drift, drift_count=carried, w_drop=1e-9)
    check(result, drift, None, drift_count=carried, w_drop=1e-9)
    assert result.drift_count[1].tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3, 2**24 + 4]


MASKS = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
}


@every_implementation
@pytest.mark.parametrize("dtype", MASKS.values(), ids=MASKS)
def test_mask_dtypes(impl, dtype):
    drift = torch.rand(3, 50) < 0.5
    valid = torch.rand(3, 50) < 0.6
    values = torch.tensor([1.0, 2.0, 100.0]) if dtype == torch.bool else torch.tensor([1.0, 2.0, 64.0])
    mask = (valid * values[torch.randint(3, (3, 50))]).to(dtype)
    assert (
        comparison.differing(impl.reliability_from_drift(drift, mask), impl.reliability_from_drift(drift, valid)) == []
    )


@every_implementation
def test_mask_values_that_are_not_one(impl):
    """Non-zero is valid: negative, small, subnormal, and beyond 32 bits; -0.0 is zero."""
    drift = torch.ones(1, 4, dtype=torch.bool)
    for mask in (
        torch.tensor([[-0.0, 0.25, -1.0, 1e-45]]),
        torch.tensor([[-0.0, 0.25, -1.0, 6e-8]], dtype=torch.float16),
        torch.tensor([[-0.0, 0.25, -1.0, 1e-40]], dtype=torch.bfloat16),
        torch.tensor([[-0.0, 0.25, -1.0, 5e-324]], dtype=torch.float64),
        torch.tensor([[0, 2**32, -1, 2**62]]),
        torch.tensor([[0, 256, -1, -(2**15)]], dtype=torch.int16),
    ):
        assert impl.reliability_from_drift(drift, mask).drift_count.tolist() == [[0, 1, 2, 3]], mask


@every_implementation
def test_strides(impl):
    drift, mask = torch.rand(7, 5) < 0.5, torch.rand(7, 5) < 0.7
    plain = impl.reliability_from_drift(drift, mask)
    wide = torch.zeros(14, 10, dtype=torch.bool)
    wide[::2, ::2] = drift
    for strided, strided_mask in (
        (drift.t().contiguous().t(), mask.t().contiguous().t()),
        (wide[::2, ::2], mask),
        (drift, mask.int().t().contiguous().t()),
    ):
        assert comparison.differing(impl.reliability_from_drift(strided, strided_mask), plain) == []
    one = torch.tensor([True, False, True, True, False])
    expanded = impl.reliability_from_drift(one.expand(7, 5), mask[:1].expand(7, 5))
    assert comparison.differing(expanded, impl.reliability_from_drift(one.repeat(7, 1), mask[:1].repeat(7, 1))) == []
    carried = torch.arange(14, dtype=torch.int32)
    assert torch.equal(
        impl.reliability_from_drift(drift, drift_count=carried[::2]).drift_count,
        impl.reliability_from_drift(drift, drift_count=carried[::2].clone()).drift_count,
    )
    seqlens = torch.tensor([0, 9, 3, 9, 5, 9], dtype=torch.int32)
    check(impl.reliability_from_drift(drift[0], cu_seqlens=seqlens[::2]), drift[0], None, cu_seqlens=seqlens[::2])


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty_padded(impl, shape):
    result = impl.reliability_from_drift(torch.zeros(shape, dtype=torch.bool))
    check(result, torch.zeros(shape, dtype=torch.bool), None)


@every_implementation
@pytest.mark.parametrize("batch", [0, 3])
def test_empty_packed(impl, batch):
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
    result = impl.reliability_from_drift(torch.zeros(0, dtype=torch.bool), cu_seqlens=cu_seqlens)
    assert result.effective_length.tolist() == [0] * batch and result.weight.shape == (0,)


@every_compiled
def test_same_bits_from_any_number_of_threads(impl, two_threads):
    drift, mask = torch.rand(64, 3000) < 0.02, torch.rand(64, 3000) < 0.9
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(impl.reliability_from_drift(drift, mask))
    check(results[0], drift, mask)
    assert [comparison.differing(results[0], result) for result in results[1:]] == [[], []]
