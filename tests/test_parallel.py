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


def ordinary(op, shape=(2, 3), width=40, k=5):
    """The arguments of an ordinary call of the operator, by name."""
    student = cases.randn(*shape, width, seed=1)
    teacher = student + cases.randn(*shape, width, seed=2, scale=1.0)
    ids = teacher.topk(k).indices
    arguments = {"student_logits": student, "mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}
    return (
        arguments
        | {
            "reliability": {"teacher_logits": teacher, "k": k},
            "token_stats": {"teacher_logits": teacher, "k": k, "token_ids": ids[..., 1]},
            "topk_policy_loss": {"topk_ids": ids, "advantages": cases.randn(*shape, k, seed=3), "impl": "reference"},
            "reverse_kl": {"teacher_logits": teacher, "impl": "reference"},
            "topk_forward_kl": {
                "teacher_topk_ids": ids,
                "teacher_topk_logprobs": teacher.log_softmax(-1).gather(-1, ids),
                "impl": "reference",
            },
        }[op]
    )


WORDS_A_POSITION = {
    "reliability": 5 * 5 + 2,
    "token_stats": 6 * 5 + 6 + 2,
    "topk_policy_loss": 5 + 3,
    "reverse_kl": 5,
    "topk_forward_kl": 3 * 5 + 1,
}


@pytest.mark.parametrize("widths", [[20, 20], [13, 0, 27]], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_communication_is_what_the_docs_say(ranks, op, widths):
    """Two exchanges of one message a rank, whatever the widths; none in the backward pass."""
    for forward, backward in ranks.run(parallel_rank.count, op, widths, ordinary(op), size=len(widths)):
        assert forward == [("all_gather", 4 * 8), ("all_gather", 4 * 6 * WORDS_A_POSITION[op])]
        assert backward == []


def test_narrow_slices_send_no_more_than_they_have(ranks):
    arguments = ordinary("reliability", k=16)
    for forward, _ in ranks.run(parallel_rank.count, "reliability", [4, 3, 33], arguments):
        assert forward[1] == ("all_gather", 4 * 6 * (5 * 16 + 2))
    arguments = ordinary("reliability", width=9, k=5)
    for forward, _ in ranks.run(parallel_rank.count, "reliability", [4, 3, 2], arguments):
        assert forward[1] == ("all_gather", 4 * 6 * (5 * 4 + 2))


# --- errors ----------------------------------------------------------------------------------------------------------


def raised(ranks, op, of_rank, size=None):
    """What each rank raises when each is called with its own change to its own slice of an ordinary call."""
    whole, size = ordinary(op), size or len(of_rank)
    cut = 40 // size
    calls = []
    for rank, change in enumerate(of_rank):
        sliced = {n: x[..., cut * rank : cut * (rank + 1)] for n, x in whole.items() if n in parallel_rank.SLICED}
        calls.append({**whole, **sliced, **change})
    return ranks.run(parallel_rank.raised, op, calls, size=size)


DIFFERENCES = [
    ("reliability", {}, {"k": 4}, "ValueError", "k must be equal on every rank, got 5 (rank 0), 4 (rank 1)"),
    (
        "reliability",
        {"w_drop": 0.5},
        {"w_drop": 0.25},
        "ValueError",
        "w_drop must be equal on every rank, got 0.5 (rank 0), 0.25 (rank 1)",
    ),
    (
        "reliability",
        {},
        {"student_logits": torch.zeros(2, 3, 20).half()},
        "TypeError",
        "student_logits must be equal on every rank, got float32 (rank 0), float16 (rank 1)",
    ),
]


@pytest.mark.parametrize(("op", "first", "second", "kind", "words"), DIFFERENCES)
def test_differences_between_ranks(ranks, op, first, second, kind, words):
    for answer in raised(ranks, op, [first, second]):
        assert answer == (kind, f"{op}: {words}")
