"""The two tiers of tests: few combinations of case, dtype and implementation by default, all of them with `--all`."""

import itertools

ALL = False  # tests/conftest.py sets it from the command line, before it imports a test


def combinations(*axes, all_of_them=None):
    """Return tuples with a value of each axis.

    With `--all`, or as `all_of_them` says, every combination. Otherwise each value of the longest axis once; the
    shorter axes take turns, so that each of their values is used and neighbours differ.
    """
    axes = [list(axis) for axis in axes]
    if ALL if all_of_them is None else all_of_them:
        return list(itertools.product(*axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]
