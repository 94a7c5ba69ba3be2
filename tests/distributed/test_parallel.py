"""`pruneopd_kernels.parallel` in real groups of processes, held to what one process computes and to the gold."""

import inspect
import math

import numpy as np
import pytest
import torch
from pruneopd_kernels.results import TopkForwardKl

import cases
import comparison
import gold
import parallel_rank
import pruneopd_kernels
from implementations import Implementation, Loss
from pruneopd_kernels import parallel
from ranks import Ranks
from test_reliability import VARIANTS
from test_reliability import answer as reliability_answer
from test_reverse_kl import calls as reverse_kl_calls
from test_token_stats import answer as stats_answer
from test_topk_forward_kl import calls as topk_forward_kl_calls
from test_topk_policy_loss import calls as topk_policy_loss_calls

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


POSITIONAL = {
    "topk_policy_loss": (topk_policy_loss_calls, ["student_logits", "topk_ids", "advantages"]),
    "reverse_kl": (reverse_kl_calls, ["student_logits", "teacher_logits"]),
    "topk_forward_kl": (topk_forward_kl_calls, ["student_logits", "teacher_topk_ids", "teacher_topk_logprobs"]),
}
LOSS_TABLE = [(name, (F32, F32)) for name in NAMES if not name.startswith("width_") or name.endswith("1_ties")]
LOSS_TABLE += [(name, (BF16, BF16)) for name in cases.MIXED]


def loss_on_ranks(ranks, op, widths, upstream, **arguments):
    """The outputs, the same on every rank bit for bit, and the slices of the gradient side by side."""
    answers = ranks.run(parallel_rank.call_loss, op, widths, arguments, upstream, size=len(widths))
    for outputs, _ in answers[1:]:
        assert comparison.same_bits(answers[0][0], outputs)
    kind = TopkForwardKl if op == "topk_forward_kl" else Loss
    return kind(*answers[0][0]), torch.cat([gradient for _, gradient in answers], -1)


@pytest.mark.parametrize(("name", "dtypes"), LOSS_TABLE, ids=cases.case_id)
@pytest.mark.parametrize("op", LOSSES)
def test_losses(ranks, op, name, dtypes):
    calls, names = POSITIONAL[op]
    for call, widths in zip(
        calls(name, dtypes), layouts(NAMES.index(name), cases.make(name, dtypes)[0].shape[-1]), strict=True
    ):
        (upstream, *args), kwargs, answer, eager = call
        result = loss_on_ranks(ranks, op, widths, upstream, **dict(zip(names, args, strict=True)), **kwargs)
        comparison.check_loss(result, answer, eager)


# --- the contract of a group -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_arguments_are_those_of_one_rank_and_the_group(op):
    of_one = inspect.signature(getattr(pruneopd_kernels, op)).parameters
    of_many = dict(inspect.signature(getattr(parallel, op)).parameters)
    group = of_many.pop("group")
    assert (group.kind, group.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert list(of_many.values()) == list(of_one.values())


def ordinary(op, shape=(2, 3), width=42, k=5):
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
            "topk_policy_loss": {"topk_ids": ids, "advantages": cases.randn(*shape, k, seed=3)},
            "reverse_kl": {"teacher_logits": teacher},
            "topk_forward_kl": {
                "teacher_topk_ids": ids,
                "teacher_topk_logprobs": teacher.log_softmax(-1).gather(-1, ids),
            },
        }[op]
    )


WORDS_A_POSITION = {
    "reliability": 5 * 5 + 2,
    "token_stats": 6 * 5 + 6 + 2,
    "topk_policy_loss": 5 + 3,
    "reverse_kl": 6,
    "topk_forward_kl": 3 * 5 + 1,
}


@pytest.mark.parametrize("widths", [[21, 21], [13, 0, 29]], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_communication_is_what_the_docs_say(ranks, op, widths):
    """Two exchanges of one message a rank, whatever the widths; none in the backward pass."""
    for forward, backward in ranks.run(parallel_rank.count, op, widths, ordinary(op), size=len(widths)):
        assert forward == [("all_gather", 4 * 8), ("all_gather", 4 * 6 * WORDS_A_POSITION[op])]
        assert backward == []


def test_narrow_slices_send_no_more_than_they_have(ranks):
    arguments = ordinary("reliability", k=16)
    for forward, _ in ranks.run(parallel_rank.count, "reliability", [4, 3, 35], arguments):
        assert forward[1] == ("all_gather", 4 * 6 * (5 * 16 + 2))
    arguments = ordinary("reliability", width=9, k=5)
    for forward, _ in ranks.run(parallel_rank.count, "reliability", [4, 3, 2], arguments):
        assert forward[1] == ("all_gather", 4 * 6 * (5 * 4 + 2))


# --- what holds of every position ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_masked_has_no_influence(ranks, op):
    arguments = ordinary(op)
    spoilt = dict(arguments)
    for name in parallel_rank.SLICED:
        if name in arguments:
            spoilt[name] = torch.where(arguments["mask"][..., None] != 0, arguments[name], torch.nan)
    for widths in ([21, 21], [13, 0, 29]):
        if op in LOSSES:
            upstream = cases.randn(2, 3, seed=4)
            one = loss_on_ranks(ranks, op, widths, upstream, **arguments)
            other = loss_on_ranks(ranks, op, widths, upstream, **spoilt)
            assert comparison.same_bits((*one[0], one[1]), (*other[0], other[1]))
            assert (other[1][0, 1] == 0).all() and other[0].loss[0, 1] == 0
        else:
            one, other = (on_ranks(ranks, op, widths, **given) for given in (arguments, spoilt))
            assert comparison.differing(one, other) == []


def test_rows_without_advantages_or_weight_are_not_read(ranks):
    arguments = ordinary("topk_policy_loss")
    arguments["student_logits"][1, 1], arguments["advantages"][1, 1] = torch.nan, 0.0
    outputs, gradient = loss_on_ranks(ranks, "topk_policy_loss", [20, 22], torch.ones(2, 3), **arguments)
    assert outputs.loss[1, 1] == 0 and (gradient[1, 1] == 0).all() and outputs.loss.isfinite().all()
    arguments = ordinary("reverse_kl") | {"weight": torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])}
    arguments["student_logits"][1, 1] = arguments["teacher_logits"][1, 1] = torch.nan
    outputs, gradient = loss_on_ranks(ranks, "reverse_kl", [20, 22], torch.ones(2, 3), **arguments)
    assert outputs.loss[1, 1] == 0 and (gradient[1, 1] == 0).all() and outputs.loss.isfinite().all()


def test_equal_logits_across_the_border_of_two_slices(ranks):
    student, teacher = torch.zeros(1, 1, 12), torch.zeros(1, 1, 12)
    student[..., 3:9], teacher[..., 5:], student[..., 8] = 1.0, -0.0, 2.0
    for widths in ([6, 6], [5, 2, 5], [0, 4, 8]):
        result = on_ranks(ranks, "token_stats", widths, student_logits=student, teacher_logits=teacher, k=5)
        assert result.student_topk_ids.flatten().tolist() == [8, 3, 4, 5, 6]
        assert result.teacher_topk_ids.flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_slice_of_minus_infinity_is_no_broken_row(ranks):
    """It takes no part, but where the other side has a finite logit, the divergence is infinite."""
    student, teacher = (cases.randn(3, 4, 30, seed=n) for n in (1, 2))
    student[0, :, :10], teacher[1, :, :10], student[2, :, :10], teacher[2, :, :10] = [-torch.inf] * 4
    student[1, :, :10] -= 2000.0  # a share that underflows
    arguments = {"student_logits": student, "teacher_logits": teacher, "k": 4, "token_ids": torch.full((3, 4), 12)}
    expected = gold.token_stats(
        *map(cases.as_float64, (student, teacher)), k=4, token_ids=torch.full((3, 4), 12).numpy()
    )
    result = on_ranks(ranks, "token_stats", [10, 7, 13], **arguments)
    assert result.forward_kl[0].isinf().all() and result.reverse_kl[1].isinf().all()
    assert result.reverse_kl[2].isfinite().all() and result.student_entropy.isfinite().all()
    eager = comparison.eager_token_stats(student, teacher, expected, token_ids=arguments["token_ids"])
    comparison.check(result, expected, eager)


def test_a_divergence_that_no_float32_holds_is_not_infinite(ranks):
    """Of one slice, which has no mass; or of the whole row, until it is weighted."""
    student, teacher = torch.full((1, 1, 20), -3e38), torch.full((1, 1, 20), -3e38)
    student[..., 3], teacher[..., 3], teacher[..., 15] = 3e38, 0.0, 3e38
    teacher[..., 3] = 3e38  # equal to that of id 15: half of the mass each
    result = on_ranks(ranks, "token_stats", [10, 10], student_logits=student, teacher_logits=teacher, k=2)
    torch.testing.assert_close(result.reverse_kl, torch.full((1, 1), math.log(2)))
    teacher[..., 3] = -3e38
    weight = torch.full((1, 1), 0.25)
    outputs, _ = loss_on_ranks(
        ranks, "reverse_kl", [10, 10], torch.ones(1, 1), student_logits=student, teacher_logits=teacher, weight=weight
    )
    torch.testing.assert_close(outputs.loss, torch.full((1, 1), 1.5e38))


@pytest.mark.parametrize("offset", [-450.0, 30.0])
def test_what_is_left_beside_a_peak_is_not_rounded_away(ranks, offset):
    """On another rank or on the same: all the entropy is in what is less than float32 can add to the peak's mass."""
    student = torch.full((1, 512), offset)
    student[0, 0] += 17.5
    expected = gold.token_stats(*[cases.as_float64(student)] * 2)["student_entropy"]
    for widths in ([1, 511], [200, 312]):
        result = on_ranks(ranks, "token_stats", widths, student_logits=student, teacher_logits=student)
        np.testing.assert_allclose(result.student_entropy, expected, rtol=1e-5)


@pytest.mark.parametrize("op", OPERATORS)
def test_float64_in_the_reference(ranks, op):
    arguments = ordinary(op) | {"impl": "reference"}
    for name in parallel_rank.SLICED:
        if name in arguments:
            arguments[name] = arguments[name].double() + 1e-9 * cases.randn(*arguments[name].shape, seed=9)
    if op in LOSSES:
        result, gradient = loss_on_ranks(ranks, op, [13, 0, 29], torch.ones(2, 3), **arguments)
        arguments.pop("impl")
        expected, of_one = Implementation("reference-operator").loss(op, None, **arguments)
        torch.testing.assert_close(gradient, of_one, rtol=1e-11, atol=1e-13)
    else:
        result = on_ranks(ranks, op, [13, 0, 29], **arguments)
        expected = getattr(pruneopd_kernels, op)(**arguments)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(result, name), value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty(ranks, op, shape):
    arguments = {name: x for name, x in ordinary(op, shape).items() if name != "mask"}
    expected = getattr(pruneopd_kernels, op)(**arguments)
    for widths in ([21, 21], [13, 0, 29]):
        for result in ranks.run(parallel_rank.call, op, widths, arguments, size=len(widths)):
            both = [(x,) if isinstance(x, torch.Tensor) else x for x in (result, expected)]
            assert comparison.same_bits(*both)


def test_one_position(ranks):
    student, teacher = cases.randn(40, seed=1), cases.randn(40, seed=2)
    result = on_ranks(ranks, "token_stats", [30, 10], student_logits=student, teacher_logits=teacher, k=3)
    whole = pruneopd_kernels.token_stats(student, teacher, k=3)
    assert torch.equal(result.student_topk_ids, whole.student_topk_ids)
    torch.testing.assert_close(result.reverse_kl, whole.reverse_kl)


def test_packed_responses_that_come_in_chunks(ranks):
    student, teacher = cases.randn(9, 42, seed=1), cases.randn(9, 42, seed=2)
    arguments = {
        "student_logits": student, "teacher_logits": teacher, "k": 4, "mask": torch.arange(9) % 4 != 2, "w_drop": 0.1,
        "cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int32),
        "drift_count": torch.tensor([1, 0, 3], dtype=torch.int32),
    }  # fmt: skip
    result, whole = on_ranks(ranks, "reliability", [20, 22], **arguments), pruneopd_kernels.reliability(**arguments)
    assert comparison.differing(result._replace(rewards=whole.rewards), whole) == []
    torch.testing.assert_close(result.rewards, whole.rewards)


# --- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", LOSSES)
def test_a_second_derivative_raises(ranks, op):
    for words in ranks.run(parallel_rank.second_derivative, op, [20, 22], ordinary(op), size=2):
        assert words is not None and words.endswith("the gradient of a loss cannot be differentiated a second time")


@pytest.mark.parametrize("op", LOSSES)
def test_modes(ranks, op):
    for plain, (silent, requires_grad), inferred, compiled in ranks.run(
        parallel_rank.modes, op, [13, 0, 29], ordinary(op)
    ):
        assert comparison.same_bits([silent], plain[:1]) and not requires_grad
        assert comparison.same_bits(inferred, plain) and comparison.same_bits(compiled, plain)


# --- errors ----------------------------------------------------------------------------------------------------------


def raised(ranks, op, of_rank, size=None):
    """What each rank raises when each is called with its own change to its own slice of an ordinary call."""
    whole, size = ordinary(op), size or len(of_rank)
    cut = 42 // size
    calls = []
    for rank, change in enumerate(of_rank):
        sliced = {n: x[..., cut * rank : cut * (rank + 1)] for n, x in whole.items() if n in parallel_rank.SLICED}
        calls.append({**whole, **sliced, **change})
    return ranks.run(parallel_rank.raised, op, calls, size=size)


LOGITS = torch.zeros(2, 3, 14)  # of one rank of three
IDS = torch.arange(6).view(2, 3)
# op, what is passed on rank 0 and what on rank 1 beside an ordinary call, the type, the argument and the values
DIFFERENCES = [
    ("reliability", {}, {"k": 4}, ValueError, "k", "5 (rank 0), 4 (rank 1)"),
    ("reliability", {"w_drop": 0}, {"w_drop": 1}, ValueError, "w_drop", "0.0 (rank 0), 1.0 (rank 1)"),
    ("reliability", {}, {"token_ids": IDS}, ValueError, "token_ids", "None (rank 0), int64 (rank 1)"),
    (
        "reliability", {}, {"student_logits": LOGITS.half()}, TypeError, "student_logits",
        "float32 (rank 0), float16 (rank 1)",
    ),
    (
        "token_stats", {}, dict.fromkeys(parallel_rank.SLICED, LOGITS[:1]) | {"mask": None, "token_ids": None},
        ValueError, "student_logits", "[2, 3, V] on cpu (rank 0), [1, 3, V] on cpu (rank 1)",
    ),
    ("token_stats", {"mask": None}, {}, ValueError, "mask", "None (rank 0), int64 (rank 1)"),
    ("topk_policy_loss", {}, {"clip_dual": torch.inf}, ValueError, "clip_dual", "3.0 (rank 0), inf (rank 1)"),
    (
        "topk_policy_loss", {}, {"advantages": torch.zeros(2, 3, 5).half()}, TypeError, "advantages",
        "float32 (rank 0), float16 (rank 1)",
    ),
    ("reverse_kl", {}, {"impl": "reference"}, ValueError, "impl", "'auto' (rank 0), 'reference' (rank 1)"),
    ("topk_forward_kl", {}, {"logprob_min": -5}, ValueError, "logprob_min", "None (rank 0), -5.0 (rank 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "first", "second", "kind", "argument", "words"), DIFFERENCES)
def test_what_differs_between_ranks_is_an_error_on_each(ranks, op, first, second, kind, argument, words):
    words = f"{op}: {argument} must be equal on every rank, got {words}"
    assert raised(ranks, op, [first, second]) == [(kind.__name__, words)] * 2


def test_of_several_values_each_is_named_with_its_first_rank(ranks):
    words = "reliability: k must be equal on every rank, got 3 (rank 0), 5 (rank 1)"
    assert raised(ranks, "reliability", [{"k": 3}, {}, {"k": 3}]) == [("ValueError", words)] * 3


def test_values_that_the_checks_look_at_are_compared_where_valid(ranks):
    """Of token ids: what is masked may be anything."""
    other_where_masked, other = IDS.clone(), IDS.clone()
    other_where_masked[0, 1], other[1, 1] = 2**40, 7  # the mask has its hole there
    assert raised(ranks, "token_stats", [{"token_ids": IDS}, {"token_ids": other_where_masked}]) == [None] * 2
    (kind, words), second = raised(ranks, "token_stats", [{"token_ids": IDS}, {"token_ids": other}])
    assert (kind, words) == second
    assert kind == "ValueError"
    assert words.startswith("token_stats: token_ids must be equal on every rank, got values of checksum ")


def test_another_operator_on_another_rank(ranks):
    words = "the operator must be equal on every rank, got token_stats (rank 0), reliability (rank 1)"
    first, second = raised(ranks, "token_stats", [{}, {"op": "reliability", "token_ids": None}])
    assert first == ("ValueError", f"token_stats: {words}")
    assert second == ("ValueError", f"reliability: {words}")


# What one rank finds by itself, in the words of one rank's operator.
OWN_ERRORS = [
    ("reliability", {"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
    (
        "reliability", {"student_logits": LOGITS[0, 0]}, ValueError,
        "student_logits must have shape [B, T, V] or [N, V], got [42]",
    ),
    (
        "reliability", {"student_logits": LOGITS.long()}, TypeError,
        "student_logits must have dtype float32, bfloat16 or float16, got int64",
    ),
    (
        "reliability", {"teacher_logits": LOGITS.mT.contiguous().mT}, ValueError,
        "teacher_logits must have stride 1 on its last axis, got 3",
    ),
    ("reliability", {"threshold": 1.5}, ValueError, "threshold must be in (0, 1], got 1.5"),
    ("reliability", {"metric": "top_p"}, ValueError, "token_ids must be given when metric is 'top_p', got None"),
    ("token_stats", {"k": 2.5}, TypeError, "k must be an int, got float"),
    (
        "token_stats", {"vocab_size": 0}, ValueError,
        "vocab_size must be between 1 and min(student, teacher) width = 42, got 0",
    ),
    (
        "token_stats", {"impl": "fastest"}, ValueError,
        "impl must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'fastest'",
    ),
    (
        "topk_policy_loss", {"topk_ids": torch.full((2, 3, 5), 99), "vocab_size": 40}, ValueError,
        "topk_ids must be below vocab_size = 40 where the position is valid, got 99",
    ),
    ("topk_forward_kl", {"logprob_min": torch.nan}, ValueError, "logprob_min must be finite, got nan"),
    ("reverse_kl", {"weight": torch.zeros(2, 4)}, ValueError, "weight must have shape [2, 3], got [2, 4]"),
]  # fmt: skip
each_own_error = pytest.mark.parametrize(("op", "change", "kind", "words"), OWN_ERRORS)


@each_own_error
def test_what_one_rank_does_wrong_is_an_error_on_each(ranks, op, change, kind, words):
    one, other, third = raised(ranks, op, [{}, change, {}])
    assert other == (kind.__name__, f"{op}: {words}")
    assert one == third == (kind.__name__, f"{op}: rank 1: {words}")


@each_own_error
def test_what_all_ranks_do_wrong_is_an_error_of_each(ranks, op, change, kind, words):
    assert raised(ranks, op, [change] * 3) == [(kind.__name__, f"{op}: {words}")] * 3


def test_an_implementation_that_one_rank_has_not(ranks):
    one, other = raised(ranks, "token_stats", [{}, {"impl": "triton"}])
    assert one[0] == other[0] == "RuntimeError"
    assert other[1].startswith("token_stats: impl='triton' is not usable here: ")
    assert one[1].startswith("token_stats: rank 1: impl='triton' is not usable here: ")


ONLY_THE_WHOLE_SHOWS = [
    ({"k": 43}, "k must be between 1 and min(vocab_size, 256) = 42, got 43"),
    ({"vocab_size": 43}, "vocab_size must be between 1 and min(student, teacher) width = 42, got 43"),
    (
        {"token_ids": torch.full((2, 3), 42), "metric": "top_p"},
        "token_ids must be between 0 and vocab_size - 1 = 41 where the position is valid, got 42",
    ),
]


@pytest.mark.parametrize(("change", "words"), ONLY_THE_WHOLE_SHOWS)
def test_what_only_the_whole_vocabulary_shows(ranks, change, words):
    assert raised(ranks, "reliability", [change] * 2) == [("ValueError", f"reliability: {words}")] * 2


def test_both_sides_are_cut_alike(ranks):
    teacher = {"teacher_logits": torch.zeros(2, 3, 20)}
    words = "teacher_logits must be cut like student_logits: on rank 0, ids end at 21, got 20"
    answers = raised(ranks, "token_stats", [teacher | {"vocab_size": 38}, {"vocab_size": 38}])
    assert answers == [("ValueError", f"token_stats: {words}")] * 2
    words = "vocab_size must be given when the last axes of student_logits and teacher_logits differ, got 42 and 41"
    assert raised(ranks, "reverse_kl", [{}, teacher]) == [("ValueError", f"reverse_kl: {words}")] * 2


def test_a_group_that_is_none(ranks):
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
def test_statistics_on_gpus(gpu_ranks, name):
    student, teacher, _ = cases.make(name, (F32, F32))
    width = student.shape[-1]
    for op, (kwargs, expected, eager) in {
        "token_stats": stats_answer(name, (F32, F32)),
        "reliability": reliability_answer(name, (F32, F32), *VARIANTS[1]),
    }.items():
        arguments = {"student_logits": student, "teacher_logits": teacher, **kwargs}
        for result in gpu_ranks.run(parallel_rank.call_on_gpu, op, [width // 3, width - width // 3], arguments):
            comparison.check(result, expected, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.MIXED)
@pytest.mark.parametrize("op", LOSSES)
def test_losses_on_gpus(gpu_ranks, op, name):
    calls, names = POSITIONAL[op]
    for (upstream, *args), kwargs, answer, eager in calls(name, (F32, F32)):
        arguments, width = dict(zip(names, args, strict=True)) | kwargs, args[0].shape[-1]
        widths = [width // 3, width - width // 3]
        parts = gpu_ranks.run(parallel_rank.call_loss_on_gpu, op, widths, arguments, upstream)
        kind = TopkForwardKl if op == "topk_forward_kl" else Loss
        gradient = torch.cat([gradient for _, gradient in parts], -1)
        comparison.check_loss((kind(*parts[0][0]), gradient), answer, eager)
