"""`pruneopd_kernels.parallel` in real groups of processes, held to what one process computes and to the gold."""

import inspect

import pytest
import torch

import cases
import comparison
import parallel_rank
import pruneopd_kernels
from pruneopd_kernels import parallel
from ranks import Ranks
from test_reliability import VARIANTS
from test_reliability import answer as reliability_answer
from test_token_stats import answer as stats_answer

OPERATORS = ["reliability", "token_stats", "topk_policy_loss", "reverse_kl", "topk_forward_kl"]
LOSSES = OPERATORS[2:]
F32, BF16, F16 = cases.F32, cases.BF16, cases.F16


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks") / "rendezvous", 3)
    yield ranks
    ranks.close()


def cuts(width):
    """Widths of slices, uneven ones: two ranks, then three with one that has nothing or next to it."""
    third, one = width // 3, min(width, 1)
    return [[width // 2, width - width // 2], [width - third - one, 0, third + one], [one, third, width - third - one]]


def layouts(number, width):
    """Two ways to cut it, one for two ranks and one for three, which are not the same from case to case."""
    two, *three = cuts(width)
    return [two if number % 2 else two[::-1], three[number % 2] if number % 4 < 2 else three[number % 2][::-1]]


def on_ranks(ranks, op, widths, **arguments):
    """The answer, which is the same on every rank, bit for bit."""
    first, *others = ranks.run(parallel_rank.call, op, widths, arguments, size=len(widths))
    for other in others:
        assert comparison.differing(first, other) == []
    return first


# --- what comes out --------------------------------------------------------------------------------------------------

NAMES = list(cases.CASES)
TABLE = [(name, (F32, F32)) for name in NAMES] + [(name, (BF16, F32)) for name in cases.MIXED]
each_case = pytest.mark.parametrize(("name", "dtypes"), TABLE, ids=cases.case_id)


@each_case
def test_token_stats(ranks, name, dtypes):
    student, teacher, _ = cases.make(name, dtypes)
    kwargs, expected, eager = stats_answer(name, dtypes)
    for widths in layouts(NAMES.index(name), student.shape[-1]):
        result = on_ranks(ranks, "token_stats", widths, student_logits=student, teacher_logits=teacher, **kwargs)
        comparison.check(result, expected, eager)


@each_case
def test_reliability(ranks, name, dtypes):
    student, teacher, _ = cases.make(name, dtypes)
    number = NAMES.index(name)
    kwargs, expected, eager = reliability_answer(name, dtypes, *VARIANTS[number % 3])
    widths = layouts(number, student.shape[-1])[number % 2]
    result = on_ranks(ranks, "reliability", widths, student_logits=student, teacher_logits=teacher, **kwargs)
    comparison.check(result, expected, eager)


# --- the contract of a group -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_arguments_are_those_of_one_rank_and_the_group(op):
    of_one = inspect.signature(getattr(pruneopd_kernels, op)).parameters
    of_many = dict(inspect.signature(getattr(parallel, op)).parameters)
    group = of_many.pop("group")
    assert (group.kind, group.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert list(of_many.values()) == list(of_one.values())
