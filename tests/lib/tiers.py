"""The two tiers of tests: few combinations of case, dtype and implementation by default, all of them with `--all`."""

import itertools

# tests/conftest.py sets these from the command line.
ALL = False
CALLS_PER_WEIGHT = 0.0  # with --fuzz; the weight of a test is that of its implementation
counted = 0  # random calls since the test began


def weight(impl) -> int:
    """Return how many random calls this implementation gets for one of the slowest."""
    return 1 if impl.slow else 40


def examples(impl) -> int:
    """Return how many random calls a test makes."""
    if CALLS_PER_WEIGHT:
        return max(1, round(CALLS_PER_WEIGHT * weight(impl)))
    return 3 if impl.slow else 60 if ALL else 8


def combinations(*axes, all_of_them=None):
    """Return tuples with a value of each axis.

    With `--all`, or as `all_of_them` says, every combination. Otherwise each value of the longest axis once; the
    shorter axes take turns, so that each of their values is used and neighbours differ.
    """
    axes = [list(axis) for axis in axes]
    if ALL if all_of_them is None else all_of_them:
        return list(itertools.product(*axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]
