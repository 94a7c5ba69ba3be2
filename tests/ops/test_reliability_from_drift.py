import numpy as np
import torch

from implementations import each_of
from operators import by_position

OP = "reliability_from_drift"
run, check = by_position(OP)


@each_of(OP)
def test_every_count_up_to_many_is_rounded_as_defined(impl):
    """R = 1 - w_drop * C with the product rounded before the difference: with some of these a fused one differs."""
    drift = torch.ones(1, 2000, dtype=torch.bool)
    for w_drop in (0.01, 0.001, 1 / 3, 1 / 7, 1 / 49, 0.0007):
        check(impl, drift, w_drop=w_drop, w_base=0.1, eps=0.0)


@each_of(OP)
def test_effective_length_counts_the_unrounded_reliability(impl):
    """At C = 10, 1 - 0.1 * C is 0 exactly; at w_drop = 1/3 and C = 3 too. eps is compared in float64."""
    drift, eps = torch.ones(1, 12, dtype=torch.bool), 1.0 - 0.01 * 5
    for w_drop, least, length in (
        (0.1, 0.0, 9), (1 / 3, 0.0, 2), (0.0, 1.0, 0), (0.01, eps, 4), (0.01, np.nextafter(eps, 0), 5)
    ):  # fmt: skip
        assert run(impl, drift, w_drop=w_drop, eps=least).effective_length.tolist() == [length]


@each_of(OP)
def test_extreme_scalars(impl):
    drift = torch.ones(2, 20, dtype=torch.bool)
    for kwargs in ({"w_drop": 1e308}, {"w_drop": 5e-324}, {"w_base": 1e308}, {"w_base": 1e-50}, {"eps": 1e308}):
        with np.errstate(over="ignore"):
            check(impl, drift, **kwargs)


@each_of(OP)
def test_large_counts_carried_in(impl):
    carried = torch.tensor([0, 2**24, 2**31 - 3], dtype=torch.int32)  # 2**24 + 1 is no float32
    check(impl, torch.ones(3, 4, dtype=torch.bool), drift_count=carried, w_drop=1e-9)
