"""`pruneopd_kernels.parallel` in real groups of processes: what it promises beside the values.

Its values are tested with all the other implementations' (tests/lib/implementations.py: PARALLEL).
"""

import inspect
import re

import pytest
import torch

import cases
import comparison
import operators
import parallel_rank
import pruneopd_kernels
import tiers
from implementations import LOGITS, LOSSES, REFERENCE_OPERATOR, leaf, on_ranks
from processes import TESTS
from pruneopd_kernels import parallel
from ranks import Ranks

# Widths of the slices of 42 ids.
CUTS = [[21, 21], [13, 0, 29]] if tiers.ALL else [[21, 21]]
DOCS = (TESTS.parent / "docs" / "parallel.md").read_text()
each_op = pytest.mark.parametrize("op", LOGITS)
each_loss = pytest.mark.parametrize("op", LOSSES)


def ordinary(op, width=42, k=5):
    """The arguments of an ordinary call: those that it needs, and a mask."""
    given = operators.required(op, operators.example(op, (2, 3), width, k))
    return given | {"mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}


# --- the contract of a group -----------------------------------------------------------------------------------------


@each_op
def test_arguments_are_those_of_one_rank_and_the_group(op):
    of_one = inspect.signature(getattr(pruneopd_kernels, op)).parameters
    of_many = dict(inspect.signature(getattr(parallel, op)).parameters)
    group = of_many.pop("group")
    assert (group.kind, group.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert list(of_many.values()) == list(of_one.values())
    assert "    group: " in getattr(parallel, op).__doc__


CANDIDATES = ("topk_ids", "teacher_topk_ids", "token_ids")
MORE = {
    "opd_loss": [{}, {"entropies": True}, {"loss": "reverse_kl"}],
    "token_stats": [{}, {"token_ids": torch.arange(6).view(2, 3)}],
}


def words_sent(op, arguments):
    """Words per position that the table in docs/parallel.md gives, such as `5 k + 2, and 2 with token_ids`."""
    pattern = rf"^\| `{op}` \| (?:(?:(\d+) )?[km] (\+) )?(\d+)(?:, and (\d+) with `(\w+)`)?"
    factor, plus, constant, more, argument = re.search(pattern, DOCS, re.MULTILINE).groups()
    k = arguments.get("k") or next((arguments[name].shape[-1] for name in CANDIDATES if name in arguments), 0)
    factor, more = int(factor or bool(plus)), int(more) if argument in arguments else 0
    return factor * k + int(constant) + more


@pytest.mark.parametrize("widths", CUTS, ids=str)
@each_op
def test_communication_is_what_the_docs_say(ranks, op, widths):
    """Two exchanges of one message a rank, whatever the widths; none in the backward pass."""
    for more in MORE.get(op, [{}]):
        arguments = ordinary(op) | more
        for forward, backward in ranks.run(parallel_rank.count, op, widths, arguments, size=len(widths)):
            assert forward == [("all_gather", 4 * 8), ("all_gather", 4 * 6 * words_sent(op, arguments))]
            assert backward == []


@pytest.mark.parametrize(("widths", "k", "sent"), [([4, 38], 16, 16), ([5, 4], 6, 5)])
def test_narrow_slices_send_no_more_than_they_have(ranks, widths, k, sent):
    arguments = ordinary("reliability", width=sum(widths), k=k)
    for forward, _ in ranks.run(parallel_rank.count, "reliability", widths, arguments, size=2):
        assert forward[1] == ("all_gather", 4 * 6 * words_sent("reliability", {"k": sent}))


@pytest.mark.parametrize(("op", "options", "forward", "backward"), [
    ("opd_loss", {}, 2, 1),
    ("opd_loss", {"entropies": True}, 2, 1),
    ("opd_loss", {"loss": "reverse_kl"}, 2, 2),
    ("topk_policy_loss", {}, 1, 1),
])  # fmt: skip
def test_slices_are_read_as_rarely_as_rows(ranks, op, options, forward, backward):
    """Both models' once, then the student's once more, and for KL the teacher's."""
    for rows in ranks.run(parallel_rank.rows_read, op, [20, 22], ordinary(op) | options, size=2):
        assert rows == [{"S": forward}, {"S": backward, "W": 1}]


# --- what holds of every position ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "skipping"), [("topk_policy_loss", "advantages"), ("reverse_kl", "weight")])
def test_rows_without_advantages_or_weight_are_not_read(ranks, op, skipping):
    arguments = {"weight": torch.ones(2, 3)} if skipping == "weight" else {}
    arguments |= {name: x.clone() for name, x in ordinary(op).items() if isinstance(x, torch.Tensor)}
    arguments[skipping][1, 1] = 0.0
    for name in parallel_rank.SLICED:
        arguments.get(name, torch.empty(2, 2, 1))[1, 1] = torch.nan
    result = on_ranks(ranks, op, [20, 22], **arguments)
    assert result["loss"][1, 1] == 0 and (result["gradient"][1, 1] == 0).all() and result["loss"].isfinite().all()


def test_a_slice_of_minus_infinity_is_no_broken_row(ranks):
    """It takes no part, but where the other side has a finite logit, the divergence is infinite."""
    student, teacher = (cases.randn(3, 4, 30, seed=n) for n in (1, 2))
    student[0, :, :10], teacher[1, :, :10], student[2, :, :10], teacher[2, :, :10] = [-torch.inf] * 4
    student[1, :, :10] -= 2000.0  # a share that underflows
    huge, others = torch.full((1, 1, 30), -3e38), torch.full((1, 1, 30), -3e38)
    huge[..., 3], others[..., 3], others[..., 15] = 3e38, 3e38, 3e38  # half of the mass each, and a KL of ln 2
    for pair in ((student, teacher), (huge, others)):
        arguments = {"student_logits": pair[0], "teacher_logits": pair[1], "k": 4}
        result = on_ranks(ranks, "token_stats", [10, 20], **arguments)
        comparison.check(result, operators.answer("token_stats", **arguments))


@each_op
def test_float64_in_the_reference(ranks, op):
    arguments = ordinary(op)
    for name in parallel_rank.SLICED:
        if name in arguments:
            arguments[name] = arguments[name].double() + 1e-9 * cases.randn(*arguments[name].shape, seed=9)
    result = on_ranks(ranks, op, CUTS[-1], **arguments, impl="reference")
    expected = REFERENCE_OPERATOR.run(op, **arguments)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-11, atol=1e-13, equal_nan=True, msg=name)


# --- autograd --------------------------------------------------------------------------------------------------------


@each_loss
def test_a_second_derivative_raises(ranks, op):
    for words in ranks.run(parallel_rank.second_derivative, op, [20, 22], ordinary(op), size=2):
        assert words is not None and words.endswith("the gradient of a loss cannot be differentiated a second time")


@pytest.mark.thorough  # the compiler takes its time to load
@each_loss
def test_modes(ranks, op):
    for plain, (silent, requires_grad), inferred, compiled in ranks.run(
        parallel_rank.modes, op, CUTS[-1], ordinary(op), size=len(CUTS[-1])
    ):
        assert comparison.same_bits([silent], plain[:1]) and not requires_grad
        assert comparison.same_bits(inferred, plain) and comparison.same_bits(compiled, plain)


# --- errors ----------------------------------------------------------------------------------------------------------


def raised(ranks, op, *of_rank):
    """What each rank raises when each is called with its own change to its own slice of an ordinary call."""
    whole, width = ordinary(op), 42 // len(of_rank)
    calls = []
    for rank, change in enumerate(of_rank):
        part = slice(width * rank, width * (rank + 1))
        calls.append({**whole, **{n: x[..., part] for n, x in whole.items() if n in parallel_rank.SLICED}, **change})
    return ranks.run(parallel_rank.raised, op, calls, size=len(of_rank))


HALF = torch.zeros(2, 3, 21)
IDS = torch.arange(6).view(2, 3)
# op, what is passed on rank 0 and what on rank 1 beside an ordinary call, the type, the argument and the values
DIFFERENCES = [
    ("reliability", {}, {"k": 4}, ValueError, "k", "5", "4"),
    ("reliability", {}, {"token_ids": IDS}, ValueError, "token_ids", "None", "int64"),
    ("reliability", {}, {"student_logits": HALF.half()}, TypeError, "student_logits", "float32", "float16"),
    ("token_stats", {}, {"student_logits": HALF[:1], "teacher_logits": HALF[:1], "mask": None}, ValueError,
     "student_logits", "[2, 3, V] on cpu", "[1, 3, V] on cpu"),
    ("reverse_kl", {}, {"impl": "reference"}, ValueError, "impl", "'auto'", "'reference'"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "first", "second", "kind", "argument", "one", "other"), DIFFERENCES)
def test_what_differs_between_ranks_is_an_error_on_each(ranks, op, first, second, kind, argument, one, other):
    words = f"{op}: {argument} must be equal on every rank, got {one} (rank 0), {other} (rank 1)"
    assert raised(ranks, op, first, second) == [(kind.__name__, words)] * 2


@pytest.mark.thorough
def test_of_several_values_each_is_named_with_its_first_rank(ranks):
    words = "reliability: k must be equal on every rank, got 3 (rank 0), 5 (rank 1)"
    assert raised(ranks, "reliability", {"k": 3}, {}, {"k": 3}) == [("ValueError", words)] * 3


def test_values_that_the_checks_look_at_are_compared_where_valid(ranks):
    """Of token ids: what is masked may be anything."""
    other_where_masked, other = IDS.clone(), IDS.clone()
    other_where_masked[0, 1], other[1, 1] = 2**40, 7  # the mask has its hole there
    assert raised(ranks, "token_stats", {"token_ids": IDS}, {"token_ids": other_where_masked}) == [None] * 2
    (kind, words), second = raised(ranks, "token_stats", {"token_ids": IDS}, {"token_ids": other})
    assert (kind, words) == second and kind == "ValueError"
    assert words.startswith("token_stats: token_ids must be equal on every rank, got values of checksum ")


def test_another_operator_on_another_rank(ranks):
    words = "the operator must be equal on every rank, got token_stats (rank 0), reliability (rank 1)"
    expected = [("ValueError", f"{op}: {words}") for op in ("token_stats", "reliability")]
    assert raised(ranks, "token_stats", {}, {"op": "reliability"}) == expected


# What one rank finds by itself, in the words of one rank's operator: a tensor, a shape, a scalar and a value.
OWN_ERRORS = [
    ("reliability", {"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
    ("reliability", {"student_logits": HALF[0, 0]}, ValueError,
     "student_logits must have shape [B, T, V] or [N, V], got [42]"),
    ("token_stats", {"vocab_size": 0}, ValueError,
     "vocab_size must be between 1 and min(student, teacher) width = 42, got 0"),
    ("topk_policy_loss", {"topk_ids": torch.full((2, 3, 5), 99), "vocab_size": 40}, ValueError,
     "topk_ids must be below vocab_size = 40 where the position is valid, got 99"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "kind", "words"), OWN_ERRORS)
def test_what_a_rank_does_wrong_is_an_error_on_each(ranks, op, change, kind, words):
    one, other = raised(ranks, op, {}, change)
    assert other == (kind.__name__, f"{op}: {words}")
    assert one == (kind.__name__, f"{op}: rank 1: {words}")
    assert raised(ranks, op, change, change) == [(kind.__name__, f"{op}: {words}")] * 2


def test_an_implementation_that_one_rank_has_not(ranks):
    (kind, one), other = raised(ranks, "token_stats", {}, {"impl": "triton"})
    assert kind == "RuntimeError" and one.startswith("token_stats: rank 1: impl='triton' is not usable here: ")
    assert other == (kind, one.replace("rank 1: ", ""))


@pytest.mark.parametrize(("change", "words"), [
    ({"k": 43}, "k must be between 1 and min(vocab_size, 256) = 42, got 43"),
    ({"token_ids": torch.full((2, 3), 42), "metric": "top_p"},
     "token_ids must be between 0 and vocab_size - 1 = 41 where the position is valid, got 42"),
])  # fmt: skip
def test_what_only_the_whole_vocabulary_shows(ranks, change, words):
    assert raised(ranks, "reliability", change, change) == [("ValueError", f"reliability: {words}")] * 2


def test_both_sides_are_cut_alike(ranks):
    teacher = {"teacher_logits": torch.zeros(2, 3, 20)}
    words = "teacher_logits must be cut like student_logits: on rank 0, ids end at 21, got 20"
    answers = raised(ranks, "token_stats", teacher | {"vocab_size": 38}, {"vocab_size": 38})
    assert answers == [("ValueError", f"token_stats: {words}")] * 2
    words = "vocab_size must be given when the last axes of student_logits and teacher_logits differ, got 42 and 41"
    assert raised(ranks, "reverse_kl", {}, teacher) == [("ValueError", f"reverse_kl: {words}")] * 2


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match=r"^reliability: group must be a torch.distributed group or None, got int$"):
        parallel.reliability(**ordinary("reliability"), group=3)


# --- on GPUs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_ranks(tmp_path_factory):
    """Over NCCL, each rank with a GPU of its own; where there is one GPU, both share it and talk over gloo."""
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    ranks = Ranks(tmp_path_factory.mktemp("gpu_ranks") / "rendezvous", 2, backend)
    yield ranks
    ranks.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.MIXED)
@each_op
def test_values_on_gpus(gpu_ranks, op, name):
    key = op, name, (cases.F32, cases.F32), 0
    upstream, arguments = operators.sample(*key)
    width = arguments[leaf(op)].shape[-1]
    result = on_ranks(gpu_ranks, op, [width // 3, width - width // 3], upstream, "cuda", **arguments)
    comparison.check(result, operators.answer_of_sample(*key))
