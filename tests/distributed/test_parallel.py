"""`pruneopd_kernels.parallel` in real groups of processes, held to what one process computes and to the gold."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

import cases
import comparison
import operators
import parallel_rank
import pruneopd_kernels
import tiers
from implementations import DECLARED, LOGITS, LOSSES, Implementation, flowing, leaf
from processes import TESTS
from pruneopd_kernels import parallel
from pruneopd_kernels.dispatch.registration import Empty
from ranks import Ranks

F32, BF16 = cases.F32, cases.BF16
# Widths of the slices of 42 ids.
CUTS = [[21, 21], [13, 0, 29]] if tiers.ALL else [[21, 21]]
CUTS_OF_12 = [[6, 6], [4, 8], *([[5, 2, 5], [0, 4, 8]] if tiers.ALL else [])]
DOCS = (TESTS.parent / "docs" / "parallel.md").read_text()
each_op = pytest.mark.parametrize("op", LOGITS)
each_loss = pytest.mark.parametrize("op", LOSSES)


def on_ranks(ranks, op, widths, upstream=None, device=None, **arguments):
    """The outputs by name, which are the same on every rank, bit for bit; of a loss the whole rows' gradient."""
    into = None
    if op in LOSSES:
        a = DECLARED[op].arguments((), operators.of_op(op, arguments))
        empty = dict(zip(DECLARED[op].fields, DECLARED[op].module.fake(a, Empty(a)), strict=False))
        into = flowing(op, empty, upstream)
    answers = ranks.run(parallel_rank.call, op, widths, arguments, into, device, size=len(widths))
    gradients = [answer.pop("gradient") for answer in answers if "gradient" in answer]
    for other in answers[1:]:
        assert comparison.differing(answers[0], other) == []
    return answers[0] | ({"gradient": torch.cat(gradients, -1)} if gradients else {})


def ordinary(op, shape=(2, 3), width=42, k=5):
    """The arguments of an ordinary call: those that it needs, and a mask."""
    given = operators.required(op, operators.example(op, shape, width, k))
    return given | ({"mask": torch.tensor([[1, 0, 1], [1, 1, 1]])} if shape == (2, 3) else {})


def of_one_rank(op, **arguments):
    return Implementation(arguments.pop("impl", "auto")).run(op, **arguments)


# --- what comes out --------------------------------------------------------------------------------------------------

FEW = ["random", "ties", "nan_many", "minus_inf_disjoint", "both_underflow", "temperatures", "wider_teacher", "width_1"]
NAMES = [name for name in (cases.CASES if tiers.ALL else FEW) if not name.startswith(("width_3276", "width_1638"))]
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16)] if tiers.ALL else [(F32, F32), (BF16, BF16)]


def cut(width, number):
    """Widths of slices, uneven ones: of two ranks, or of three where one has nothing or next to it."""
    third, one = width // 3, min(width, 1)
    three = [[width - third - one, 0, third + one], [one, third, width - third - one]] if tiers.ALL else []
    return [[width // 2, width - width // 2], [width - one, one], *three][number % (4 if tiers.ALL else 2)]


@pytest.mark.parametrize(("name", "number", "dtypes"), tiers.combinations(NAMES, range(4), DTYPES, all_of_them=False))
@each_op
def test_values(ranks, op, name, number, dtypes):
    number += LOGITS.index(op)
    key = op, name, dtypes, number % len(operators.variants_of(op))
    upstream, arguments = operators.sample(*key)
    widths = cut(arguments[leaf(op)].shape[-1], number)
    comparison.check(on_ranks(ranks, op, widths, upstream, **arguments), operators.answer_of_sample(*key))


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


@each_op
def test_what_is_masked_has_no_influence(ranks, op):
    arguments = ordinary(op)
    spoilt = {name: torch.where(arguments["mask"][..., None] != 0, arguments[name], torch.nan)
              for name in parallel_rank.SLICED if name in arguments}  # fmt: skip
    for widths in CUTS:
        one, other = (on_ranks(ranks, op, widths, **given) for given in (arguments, arguments | spoilt))
        assert comparison.differing(one, other) == []
        if op in LOSSES:
            assert (other["gradient"][0, 1] == 0).all() and (other[DECLARED[op].differentiable[0]][0, 1] == 0).all()


@pytest.mark.parametrize(("op", "skipping"), [("topk_policy_loss", "advantages"), ("reverse_kl", "weight")])
def test_rows_without_advantages_or_weight_are_not_read(ranks, op, skipping):
    arguments = {"weight": torch.ones(2, 3)} if skipping == "weight" else {}
    arguments |= {name: x.clone() for name, x in ordinary(op).items() if isinstance(x, torch.Tensor)}
    arguments[skipping][1, 1] = 0.0
    for name in parallel_rank.SLICED:
        arguments.get(name, torch.empty(2, 2, 1))[1, 1] = torch.nan
    result = on_ranks(ranks, op, [20, 22], **arguments)
    assert result["loss"][1, 1] == 0 and (result["gradient"][1, 1] == 0).all() and result["loss"].isfinite().all()


def test_equal_logits_across_the_border_of_two_slices(ranks):
    student, teacher = torch.zeros(1, 1, 12), torch.zeros(1, 1, 12)
    student[..., 3:9], teacher[..., 5:], student[..., 8] = 1.0, -0.0, 2.0
    for widths in CUTS_OF_12:
        result = on_ranks(ranks, "token_stats", widths, student_logits=student, teacher_logits=teacher, k=5)
        assert result["student_topk_ids"].flatten().tolist() == [8, 3, 4, 5, 6]
        assert result["teacher_topk_ids"].flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_slice_of_minus_infinity_is_no_broken_row(ranks):
    """It takes no part, but where the other side has a finite logit, the divergence is infinite."""
    student, teacher = (cases.randn(3, 4, 30, seed=n) for n in (1, 2))
    student[0, :, :10], teacher[1, :, :10], student[2, :, :10], teacher[2, :, :10] = [-torch.inf] * 4
    student[1, :, :10] -= 2000.0  # a share that underflows
    arguments = {"student_logits": student, "teacher_logits": teacher, "k": 4, "token_ids": torch.full((3, 4), 12)}
    result = on_ranks(ranks, "token_stats", [10, 20], **arguments)
    assert result["forward_kl"][0].isinf().all() and result["reverse_kl"][1].isinf().all()
    assert result["reverse_kl"][2].isfinite().all()
    comparison.check(result, operators.answer("token_stats", **arguments))


def test_a_divergence_that_no_float32_holds_is_not_infinite(ranks):
    """Of one slice, which has no mass; or of the whole row, until it is weighted."""
    student, teacher = torch.full((1, 1, 20), -3e38), torch.full((1, 1, 20), -3e38)
    student[..., 3], teacher[..., 3], teacher[..., 15] = 3e38, 3e38, 3e38  # ids 3 and 15: half of the mass each
    result = on_ranks(ranks, "token_stats", [10, 10], student_logits=student, teacher_logits=teacher, k=2)
    torch.testing.assert_close(result["reverse_kl"], torch.full((1, 1), math.log(2)))
    teacher[..., 3] = -3e38
    arguments = {"student_logits": student, "teacher_logits": teacher, "weight": torch.full((1, 1), 0.25)}
    torch.testing.assert_close(on_ranks(ranks, "reverse_kl", [10, 10], **arguments)["loss"], torch.full((1, 1), 1.5e38))


def test_huge_finite_logits(ranks):
    """No term is lost, and what no float32 holds before it is weighted keeps its gradient."""
    student, teacher = torch.tensor([[0.0, -3e38]]), torch.tensor([[0.0, -88.0]])
    given = {"student_logits": student, "teacher_logits": teacher, "k": 1}
    result = on_ranks(ranks, "token_stats", [1, 1], **given)
    comparison.check(result, operators.answer("token_stats", **given))
    assert result["forward_kl"].item() == pytest.approx(1.816, abs=1e-3)
    given = {"student_logits": torch.zeros(1, 2), "teacher_logits": torch.tensor([[3e38, -3e38]])}
    result = on_ranks(ranks, "reverse_kl", [1, 1], **given, weight=torch.full((1,), 0.5))
    expected = of_one_rank("reverse_kl", **given, weight=torch.full((1,), 0.5), impl="reference")
    assert expected["gradient"].isfinite().all() and expected["gradient"].any()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, msg=name)


def test_divergences_are_never_negative(ranks):
    """Where both models agree except for rounding."""
    student = cases.randn(64, 40, seed=0, scale=1)
    result = on_ranks(ranks, "token_stats", [20, 20], student_logits=student, teacher_logits=student + 1 / 3, k=4)
    assert (result["reverse_kl"] >= 0).all() and (result["forward_kl"] >= 0).all()


@pytest.mark.parametrize("loss", ["topk_policy", "reverse_kl"])
def test_opd_loss_is_reliability_followed_by_the_loss(ranks, loss):
    arguments = ordinary("opd_loss", width=42)
    for widths in CUTS:
        scored = on_ranks(ranks, "reliability", widths, **arguments)
        result = on_ranks(ranks, "opd_loss", widths, **arguments, loss=loss)
        gradient = result.pop("gradient")
        both = {name: result[name] for name in scored}
        torch.testing.assert_close(both.pop("rewards"), scored["rewards"])
        assert comparison.differing(both, {name: scored[name] for name in both}) == []
        student, teacher, mask = (arguments[name] for name in ("student_logits", "teacher_logits", "mask"))
        if loss == "topk_policy":
            given = {"topk_ids": scored["topk_ids"], "advantages": scored["rewards"]}
            expected = on_ranks(ranks, "topk_policy_loss", widths, student_logits=student, mask=mask, **given)
        else:
            given = {"teacher_logits": teacher, "weight": scored["weight"]}
            expected = on_ranks(ranks, "reverse_kl", widths, student_logits=student, mask=mask, **given)
        torch.testing.assert_close(result["loss"], expected["loss"])
        torch.testing.assert_close(gradient, expected["gradient"])


@pytest.mark.parametrize("offset", [-450.0, 30.0])
def test_what_is_left_beside_a_peak_is_not_rounded_away(ranks, offset):
    """On another rank or on the same: all the entropy is in what is less than float32 can add to the peak's mass."""
    student = torch.full((1, 512), offset)
    student[0, 0] += 17.5
    arguments = {"student_logits": student, "teacher_logits": student}
    expected = operators.answer("token_stats", **arguments).gold["student_entropy"]
    for widths in ([1, 511], [200, 312]):
        entropy = on_ranks(ranks, "token_stats", widths, **arguments)["student_entropy"]
        np.testing.assert_allclose(entropy, expected, rtol=1e-5)


@each_op
def test_float64_in_the_reference(ranks, op):
    arguments = ordinary(op)
    for name in parallel_rank.SLICED:
        if name in arguments:
            arguments[name] = arguments[name].double() + 1e-9 * cases.randn(*arguments[name].shape, seed=9)
    result = on_ranks(ranks, op, CUTS[-1], **arguments, impl="reference")
    expected = Implementation("reference-operator").run(op, **arguments)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-11, atol=1e-13, equal_nan=True, msg=name)


@each_op
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty(ranks, op, shape):
    arguments = ordinary(op, shape)
    for widths in CUTS:
        assert comparison.differing(on_ranks(ranks, op, widths, **arguments), of_one_rank(op, **arguments)) == []


def test_one_position(ranks):
    arguments = {"student_logits": cases.randn(40, seed=1), "teacher_logits": cases.randn(40, seed=2), "k": 3}
    comparison.check(
        on_ranks(ranks, "token_stats", [30, 10], **arguments), operators.answer("token_stats", **arguments)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_responses_that_come_in_chunks(ranks, dtype):
    arguments = operators.example("reliability", (3, 4), 42, 4, packed=True)
    arguments["cu_seqlens"] = torch.tensor([0, 5, 5, 12], dtype=dtype)
    result, whole = on_ranks(ranks, "reliability", [20, 22], **arguments), of_one_rank("reliability", **arguments)
    torch.testing.assert_close(result.pop("rewards"), whole.pop("rewards"))
    assert comparison.differing(result, whole) == []


def test_slots_are_empty_where_the_whole_row_has_too_few_ids(ranks):
    """One slice has fewer than k ids with a logit, and the other fills up; or both together have too few."""
    student, teacher = torch.full((1, 3, 12), -torch.inf), torch.full((1, 3, 12), -torch.inf)
    student[0, 0, 6], teacher[0, 0, 7] = 0.0, 0.0  # one id each, and not the same
    student[0, 1, [1, 6]], teacher[0, 1, 6] = 0.0, 0.0
    student[0, 2, [0, 7, 8, 9, 11]], teacher[0, 2] = 0.0, 1.0
    arguments = {"student_logits": student, "teacher_logits": teacher, "k": 4}
    for widths in CUTS_OF_12:
        result = on_ranks(ranks, "reliability", widths, **arguments)
        assert result["overlap"].tolist() == [[0.0, 0.5, 0.25]]
        assert result["topk_ids"][0].tolist() == [[6, 0, 1, 2], [1, 6, 0, 2], [0, 7, 8, 9]]
        comparison.check(result, operators.answer("reliability", **arguments))
        ids, logprobs = torch.tensor([[[6, 0], [6, 1], [7, -1]]]), torch.full((1, 3, 2), -0.7)
        logprobs[0, 0, 1] = -torch.inf
        sent = {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}
        result = on_ranks(ranks, "topk_forward_kl", widths, student_logits=student, **sent)
        assert result["overlap"].tolist() == [[1.0, 1.0, 0.5]]


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
    ("reliability", {"w_drop": 0}, {"w_drop": 1}, ValueError, "w_drop", "0.0", "1.0"),
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


# What one rank finds by itself, in the words of one rank's operator: of each kind of check one.
OWN_ERRORS = [
    ("reliability", {"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
    ("reliability", {"student_logits": HALF[0, 0]}, ValueError,
     "student_logits must have shape [B, T, V] or [N, V], got [42]"),
    ("reliability", {"teacher_logits": HALF.mT.contiguous().mT}, ValueError,
     "teacher_logits must have stride 1 on its last axis, got 3"),
    ("token_stats", {"vocab_size": 0}, ValueError,
     "vocab_size must be between 1 and min(student, teacher) width = 42, got 0"),
    ("token_stats", {"impl": "fastest"}, ValueError,
     "impl must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'fastest'"),
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
    one, other = raised(ranks, "token_stats", {}, {"impl": "triton"})
    assert one[0] == other[0] == "RuntimeError"
    assert other[1].startswith("token_stats: impl='triton' is not usable here: ")
    assert one[1].startswith("token_stats: rank 1: impl='triton' is not usable here: ")


@pytest.mark.parametrize(("change", "words"), [
    ({"k": 43}, "k must be between 1 and min(vocab_size, 256) = 42, got 43"),
    ({"vocab_size": 43}, "vocab_size must be between 1 and min(student, teacher) width = 42, got 43"),
    (
        {"token_ids": torch.full((2, 3), 42), "metric": "top_p"},
        "token_ids must be between 0 and vocab_size - 1 = 41 where the position is valid, got 42",
    ),
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
    key = op, name, (F32, F32), 0
    upstream, arguments = operators.sample(*key)
    width = arguments[leaf(op)].shape[-1]
    result = on_ranks(gpu_ranks, op, [width // 3, width - width // 3], upstream, "cuda", **arguments)
    comparison.check(result, operators.answer_of_sample(*key))
