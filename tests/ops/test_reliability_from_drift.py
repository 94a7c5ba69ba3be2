from fractions import Fraction

import numpy as np
import pytest
import torch

from implementations import each_of
from operators import by_position

OP = "reliability_from_drift"
W_DROPS = [0.01, 0.001, 1 / 3, 1 / 7, 1 / 49, 0.0007]
run, check = by_position(OP)


@each_of(OP)
@pytest.mark.parametrize("w_drop", W_DROPS)
def test_every_count_up_to_many_is_rounded_as_defined(impl, w_drop):
    """R = 1 - w_drop * C with the product rounded before the difference."""
    drift = torch.ones(1, 2000, dtype=torch.bool)
    kwargs = {"w_drop": w_drop, "w_base": 0.1, "eps": 0.0}
    check(impl, drift, **kwargs)


def test_a_fused_multiply_add_would_show():
    """It gives R other bits for some of those counts: computed here in fractions, rounded once."""
    for w_drop in W_DROPS:
        fused = [max(float(1 - Fraction(w_drop) * c), 0.0) for c in range(2000)]
        defined = [max(1.0 - w_drop * c, 0.0) for c in range(2000)]
        if not np.array_equal(np.float32(fused), np.float32(defined)):
            return
    raise AssertionError("the test above cannot fail")


@each_of(OP)
def test_effective_length_counts_the_unrounded_reliability(impl):
    """At C = 10, 1 - 0.1 * C is 0 exactly; at w_drop = 1/3 and C = 3 too. eps is compared in float64."""
    drift = torch.ones(1, 12, dtype=torch.bool)
    assert run(impl, drift, w_drop=0.1, eps=0.0).effective_length.tolist() == [9]
    assert run(impl, drift, w_drop=1 / 3, eps=0.0).effective_length.tolist() == [2]
    assert run(impl, drift, w_drop=0.0, eps=1.0).effective_length.tolist() == [0]
    eps = 1.0 - 0.01 * 5
    assert run(impl, drift, w_drop=0.01, eps=eps).effective_length.tolist() == [4]
    assert run(impl, drift, w_drop=0.01, eps=np.nextafter(eps, 0)).effective_length.tolist() == [5]


@each_of(OP)
def test_extreme_scalars(impl):
    drift = torch.ones(2, 20, dtype=torch.bool)
    for kwargs in ({"w_drop": 1e308}, {"w_drop": 5e-324}, {"w_base": 1e308}, {"w_base": 1e-50}, {"eps": 1e308}):
        with np.errstate(over="ignore"):
            check(impl, drift, **kwargs)


@each_of(OP)
def test_large_counts_carried_in(impl):
    drift = torch.ones(3, 4, dtype=torch.bool)
    carried = torch.tensor([0, 2**24, 2**31 - 3], dtype=torch.int32)  # 2**24 + 1 is no float32
    result = check(impl, drift, drift_count=carried, w_drop=1e-9)
    assert result.drift_count[1].tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3, 2**24 + 4]


@each_of(OP)
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
        assert run(impl, drift, mask).drift_count.tolist() == [[0, 1, 2, 3]], mask
