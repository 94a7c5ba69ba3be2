"""The functions from hidden states: the numbers, against the same with all logits at once."""

import functools
import inspect
import itertools
from dataclasses import replace

import pytest
import torch

from comparison import EPS, differing
from hidden_states import (
    LOSSES,
    OF_SERVERS,
    OPTIONS,
    REDUCTIONS,
    STUDENT,
    H,
    K,
    Problem,
    T,
    V,
    at_once,
    from_server,
    problem,
    with_gradients,
)
from pruneopd_kernels import (
    linear_opd_loss,
    linear_reliability,
    linear_selected_logprobs,
    opd_rewards,
    reference,
    reliability,
    token_stats,
)
from pruneopd_kernels.linear import linear_token_stats
from pruneopd_kernels.ops import OPERATORS
from tiers import combinations

IMPLS = ["reference", "cpp"]
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_pass = pytest.mark.parametrize(("loss", "reduction"), combinations(LOSSES, REDUCTIONS))
exactly = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
# What does not depend on the logits' last digits.
COUNTED = ("overlap", "drift", "drift_count", "reliability", "weight", "effective_length", "topk_ids")


def check_counted(got, expected):
    assert [name for name in COUNTED if not torch.equal(getattr(got, name), getattr(expected, name))] == []


def check_gradients(got, expected):
    for one, other in zip(got, expected, strict=True):
        exactly(one, other)


@pytest.mark.parametrize(("function", "op"), [
    (linear_reliability, "reliability"), (linear_opd_loss, "reliability"), (linear_token_stats, "token_stats"),
    (linear_selected_logprobs, "selected_logprobs"),
])  # fmt: skip
def test_arguments_are_the_operators(function, op):
    own, declared = (inspect.signature(f).parameters for f in (function, OPERATORS[op].function))
    shared = {name: parameter for name, parameter in declared.items() if not name.endswith("logits")}
    assert {name: own[name] for name in shared} == shared
    assert all(f"    {name}: " in function.__doc__ for name in own)
    with pytest.raises(TypeError, match=f"^{function.__name__}: got an unexpected keyword argument 'threshhold'$"):
        function(
            *[torch.zeros(2, 2)] * [p.default for p in own.values()].count(inspect.Parameter.empty), threshhold=0.5
        )


# --- reliability --------------------------------------------------------------------------------------------------

LAYOUTS = ["holes", "prefix", "none", "nothing", "packed", "packed with holes"]
MORE = [
    {}, {"metric": "top_p", "top_p": 0.5}, {"reward_weight": "teacher"}, {"student_temperature": 0.7},
    {"teacher_temperature": 2.0}, {"threshold": 0.5, "eps": 0.3, "w_base": 0.0},
    {"drift_count": torch.tensor([0, 3, 1], dtype=torch.int32)},
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "more", "chunk_size", "impl", "dtype"),
    combinations(LAYOUTS, MORE, [1, 3, 100, None], IMPLS, [torch.float32, torch.bfloat16, torch.float16]),
)
def test_bits_of_the_operators_on_the_same_logits(layout, more, chunk_size, impl, dtype):
    """Of small integers, whose products are exact in any dtype and in any chunk; from hidden states with gaps."""
    given = problem(mask="holes" if layout.endswith("holes") else "none" if "packed" in layout else layout)
    given = given.each(lambda x: (1.5 * x).round().clamp(-3, 3)).to(dtype)
    if layout.startswith("packed"):
        given = given.packed(5, 0, 7)
    token_ids = torch.randint(V, given.student_hidden.shape[:-1])
    plain = {"impl": impl, "cu_seqlens": given.cu_seqlens, "token_ids": token_ids, **OPTIONS}
    expected, usual = (reliability(*given.logits(), given.mask, **plain | some) for some in (more, {}))
    assert layout == "nothing" or (differing(expected, usual) if more else 0 < usual.drift.sum() < usual.drift.numel())
    given.student_hidden = given.student_hidden.repeat_interleave(2, -1)[..., ::2]
    arguments = given.arguments(chunk_size=chunk_size, **plain | more)
    assert differing(expected, linear_reliability(**arguments)) == []
    loss = linear_opd_loss(**arguments)
    assert differing(expected, {name: getattr(loss, name) for name in expected._fields}) == []
    of_stats = inspect.signature(linear_token_stats).parameters
    arguments = {name: x for name, x in arguments.items() if name in of_stats}
    scalars = {name: x for name, x in (plain | more).items() if name in of_stats}
    assert differing(token_stats(*given.logits(), given.mask, **scalars), linear_token_stats(**arguments)) == []


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0,)])
def test_empty_batches(shape):
    given = problem(torch.float32, mask="none")
    hidden, teacher = torch.zeros(*shape, H), torch.zeros(*shape, 5)
    cu_seqlens = torch.tensor([0], dtype=torch.int32) if len(shape) == 1 else None
    given = replace(given, student_hidden=hidden, teacher_hidden=teacher, cu_seqlens=cu_seqlens)
    for reduction in REDUCTIONS:
        out, gradients = with_gradients(given, reduction=reduction)
        assert (out.entropy.shape, out.topk_ids.shape) == (shape, (*shape, K))
        assert out.effective_length.shape == ((shape[0] if len(shape) == 2 else 0),)
        for name, gradient in zip(STUDENT, gradients, strict=True):
            assert torch.equal(gradient, torch.zeros_like(getattr(given, name)))


# --- losses and gradients -----------------------------------------------------------------------------------------

VARIANTS = ["holes", "none", "packed", "no bias", "wider teacher", "temperatures", "soft caps", "weight", "tail"]


@pytest.mark.parametrize(
    ("variant_and_loss", "reduction", "chunk_size"),
    combinations(itertools.product(VARIANTS, LOSSES), REDUCTIONS, [1, 3, None, 2, 100]),
)
def test_losses_and_gradients_in_float64(variant_and_loss, reduction, chunk_size):
    variant, loss = variant_and_loss
    given, options = problem(mask="none" if variant in ("none", "packed") else "holes", bias=variant != "no bias"), {}
    if variant == "packed":
        given = given.packed(5, 0, 7)
    elif variant == "wider teacher":
        weight = torch.cat([given.teacher_weight, 100 + torch.rand(9, 5, dtype=torch.float64)])
        bias = torch.cat([given.teacher_bias, torch.zeros(9, dtype=torch.float64)])
        given, options = replace(given, teacher_weight=weight, teacher_bias=bias), {"vocab_size": 45}
    elif variant == "temperatures":
        options = {"student_temperature": 0.6, "teacher_temperature": 1.7}
    elif variant == "soft caps":
        given = replace(given, student_softcap=2.0, teacher_softcap=3.0)
    elif variant == "weight":
        options = {"weight": torch.rand(given.mask.shape, dtype=torch.float64)}
    elif variant == "tail" and loss == OF_SERVERS:
        options = {"tail": "generalised"}
    scale = torch.rand(given.student_hidden.shape[:-1] if variant != "temperatures" else (), dtype=torch.float64)
    if scale.ndim:
        scale.view(-1)[-1] = 0.0
    value, scored, expected = at_once(given, loss, scale, **options)
    passes = {"loss": loss, "reduction": reduction, "chunk_size": chunk_size}
    out, gradients = with_gradients(given, scale=scale, **passes, **options)
    exactly(out.loss, (scale * value).sum() if reduction == "sum" else value)
    check_gradients(gradients, expected)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    check_counted(out, scored)
    exactly(out.rewards, scored.rewards)
    exactly(out.entropy, scored.student_entropy)
    if variant == "wider teacher":
        assert not gradients[1][45:].any()


@pytest.mark.parametrize("wanted", [STUDENT[:1], STUDENT[1:2], STUDENT[2:], STUDENT[:2], ()], ids=" ".join)
@each_pass
def test_what_is_frozen_gets_no_gradient(loss, reduction, wanted):
    options = {"loss": loss, "reduction": reduction}
    expected, gradients = with_gradients(problem(), **options)
    got, of_wanted = with_gradients(problem(), wanted, **options)
    assert torch.equal(got.loss, expected.loss)
    assert got.loss.requires_grad == bool(wanted)
    check_gradients(of_wanted, [gradients[STUDENT.index(name)] for name in wanted])


@pytest.mark.parametrize(
    ("loss", "reduction", "impl", "dtype"),
    combinations(LOSSES, REDUCTIONS, IMPLS[::-1], [torch.bfloat16, torch.float32]),
)
def test_gradients_are_as_good_as_eagers(impl, loss, reduction, dtype):
    """At most twice the error that all logits at once have in float32, and of what is rounded at the end."""
    given = problem(dtype, seed=3, b=4, t=20, v=300)
    scale = torch.rand(given.mask.shape)
    _, got = with_gradients(given, scale=scale, chunk_size=7, loss=loss, reduction=reduction, impl=impl)
    _, _, gold = at_once(given.to(torch.float64), loss, scale)
    _, _, eager = at_once(given, loss, scale)
    unit = torch.finfo(dtype).eps
    for name, one, exact, other in zip(STUDENT, got, gold, eager, strict=True):
        assert one.dtype == dtype
        error, eager_error = ((x.double() - exact).abs().max() for x in (one, other))
        assert error <= 2 * eager_error + 2 * max(unit, EPS) * exact.abs().max(), name


@each_loss
def test_sums_over_many_chunks_stay_good_in_half_precision(loss):
    """Summed in bfloat16 over 256 chunks, the head's gradient would stand still: a term is below half a unit of it."""
    given = problem(torch.bfloat16, seed=1, mask="none", b=4, t=64, v=40)
    options = {"loss": loss, "reduction": "sum"}
    one_by_one, at_a_time = (with_gradients(given, chunk_size=size, **options)[1] for size in (1, 256))
    for one, other in zip(one_by_one[1:], at_a_time[1:], strict=True):
        assert (one.float() - other.float()).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * one.abs().max()


def small(dtype, hidden, weight, teacher):
    """One position of a head that both models share."""
    hidden, weight, teacher = (torch.tensor(x, dtype=dtype) for x in ([[hidden]], weight, [[teacher]]))
    return Problem(hidden, weight, teacher, weight)


REVERSE_KL = {"loss": "reverse_kl", "k": 1, "w_drop": 0.0, "w_base": 0.0}


@each_impl
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_operands_are_float32(impl, reduction, dtype):
    """Both logits are 20 in bfloat16, and their difference of 0.1 is gone."""
    given = small(dtype, [1.0, 0.05], [[20.0, 1.0], [20.0, -1.0]], [1.0, -0.05])
    out, gradients = with_gradients(given, reduction=reduction, impl=impl, **REVERSE_KL)
    value, _, expected = at_once(given.to(torch.float64), **REVERSE_KL)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), value.sum() if reduction == "sum" else value, rtol=1e-4, atol=0)
    assert value.item() == pytest.approx(0.005, rel=0.01)
    for one, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@each_impl
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gradient_below_half_precision_comes_back_through_a_grad_scaler(impl, reduction, autocast):
    """2e-7 times 0.05 is 0 in float16; the scaler's factor of 65536 arrives last."""
    given = small(torch.float16, [0.1], [[0.5], [-0.5]], [-0.1])
    wanting, leaves = given.wanting("student_hidden", "student_weight")
    scale = {"scale": torch.tensor(2e-7)} if reduction == "sum" else {}
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        out = linear_opd_loss(**wanting.arguments(reduction=reduction, impl=impl, **scale, **REVERSE_KL))
    loss = out.loss.sum() if scale else 2e-7 * out.loss.sum()
    (65536 * loss).backward()
    _, _, expected = at_once(given.to(torch.float64), scale=torch.tensor(2e-7 * 65536), **REVERSE_KL)
    assert expected[0].item() == pytest.approx(6.5e-4, rel=0.01)
    for leaf, exact in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=2e-3, atol=0)


@each_loss
def test_a_broken_row_stays_where_it_is(loss):
    """NaN in one position's hidden state is NaN in its loss and gradient; other positions' are as without it."""
    given = problem(mask="none")
    spoilt = replace(given, student_hidden=given.student_hidden.clone())
    spoilt.student_hidden[1, 4] = torch.nan
    _, (expected,) = with_gradients(given, STUDENT[:1], loss=loss)
    out, (got,) = with_gradients(spoilt, STUDENT[:1], loss=loss)
    assert out.loss[1, 4].isnan() and out.entropy[1, 4].isnan() and got[1, 4].isnan().all()
    exactly(got[0], expected[0])
    exactly(got[1, :4], expected[1, :4])


@pytest.mark.parametrize(("loss", "side"), [*itertools.product(LOSSES, ["student", "teacher"]), (OF_SERVERS, "server")])
def test_a_broken_row_agrees_with_nothing(loss, side):
    given, sent = problem(mask="none"), {}
    given.student_bias[:K] += 100.0  # the ids that are first in a row of NaN
    getattr(given, "teacher_hidden" if side == "teacher" else "student_hidden")[1, 4] = torch.nan
    for options in ({}, {"metric": "top_p", "token_ids": torch.zeros(3, T, dtype=torch.int64)}):
        scores = reference.reliability(*given.logits(), **OPTIONS, **options)
        remote, sent = from_server(given) if side == "server" else (given, {})
        out = linear_opd_loss(**remote.arguments(loss=loss, **sent, **options))
        assert out.overlap[1, 4] == 0 and out.drift[1, 4] and (out.rewards[1, 4].isnan().all() or sent)
        assert sent or not check_counted(out, scores)


@each_loss
def test_a_loss_beyond_float32_has_a_gradient_of_nan(loss):
    given, weight = problem(torch.float32), torch.full((3, T), 3e38)
    out, (gradient,) = with_gradients(given, STUDENT[:1], loss=loss, weight=weight)
    finite = out.loss.isfinite()
    assert 0 < finite[given.mask].sum() < given.mask.sum()
    assert gradient[~finite].isnan().all()


@each_pass
def test_what_has_no_weight_has_no_part(loss, reduction):
    """Where L is 0, a teacher's broken row gives a loss and a gradient of 0; so does a scale of 0, or a mask."""
    given = problem()
    given.teacher_hidden[1] = given.student_hidden[~given.mask] = torch.nan
    drift_count = torch.tensor([0, 9, 0], dtype=torch.int32)
    out, gradients = with_gradients(given, w_base=0.0, drift_count=drift_count, loss=loss, reduction=reduction)
    assert out.loss.isfinite().all() and all(x.isfinite().all() for x in gradients) and not gradients[0][1].any()
    scale = torch.where(given.mask, 1.0, torch.nan)
    scale[1] = 0.0
    out, gradients = with_gradients(given, scale=scale, loss=loss, reduction="sum")
    assert out.loss.isfinite() and all(x.isfinite().all() for x in gradients)


# --- exhausted responses ------------------------------------------------------------------------------------------

EXHAUSTING = {"w_drop": 0.5, "w_base": 0.0, "threshold": 0.9}  # R is 0 exactly, and not below


def exhausted_by_hand(given):
    """The mask without what lies behind the first R of 0 of each response."""
    mask = torch.ones(given.student_hidden.shape[:-1], dtype=torch.bool) if given.mask is None else given.mask
    kept = reference.reliability(*given.logits(), mask, k=K, **EXHAUSTING).reliability
    is_zero = (mask & (kept == 0)).int()
    return mask & (is_zero.cumsum(1) - is_zero == 0)


@pytest.mark.parametrize(
    ("chunk_size", "loss", "reduction", "mask", "weight"),
    combinations([1, 2, 3, 5, 100], [*LOSSES, "server"], REDUCTIONS, ["none", "holes"], [None, None, 1.5]),
)
def test_skipping_exhausted_responses_is_masking_them(chunk_size, loss, reduction, mask, weight):
    """A weight of one's own does not count where a response is exhausted."""
    given = problem(mask=mask, t=12)
    by_hand = exhausted_by_hand(given)
    valid = by_hand.numel() if given.mask is None else int(given.mask.sum())
    assert 0 < by_hand.sum() < valid
    options = {"loss": loss, "reduction": reduction, "chunk_size": chunk_size, **EXHAUSTING}
    options["weight"] = weight and torch.full((3, 12), weight, dtype=torch.float64)
    if loss == "server":
        given, sent = from_server(given)
        options |= {"loss": OF_SERVERS, **sent}
    expected, gradients = with_gradients(replace(given, mask=by_hand), **options)
    got, skipping = with_gradients(given, skip_exhausted=True, **options)
    check_counted(got, expected)
    for name in ("loss", "entropy", "rewards"):
        exactly(getattr(got, name), getattr(expected, name))
    check_gradients(skipping, gradients)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_a_response_that_comes_exhausted_is_skipped_whole(chunk_size):
    given = problem(mask="none")
    options = {"drift_count": torch.tensor([0, 3, 1], dtype=torch.int32), "chunk_size": chunk_size, **EXHAUSTING}
    out = linear_opd_loss(**given.arguments(skip_exhausted=True, **options))
    assert out.drift_count[1].tolist() == [3] * T
    assert out.topk_ids[1].tolist() == [list(range(K))] * T
    assert [bool(row.any()) for row in out.entropy] == [True, False, True]
    packed = linear_opd_loss(**given.packed(7, 7, 7).arguments(skip_exhausted=True, **options))
    for name, one, other in zip(out._fields, packed, out, strict=True):
        exactly(one, other if name == "effective_length" else other.flatten(0, 1))


def test_without_drop_nothing_is_exhausted():
    options = {"w_base": 0.0, "w_drop": 0.0}
    outs = [linear_opd_loss(**problem().arguments(skip_exhausted=skip, **options)) for skip in (False, True)]
    assert differing(*outs) == []


# --- a teacher's server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction_and_metric", "chunk_size", "ids"),
    combinations(itertools.product(REDUCTIONS, ["overlap", "top_p"]), [1, 3, None], [torch.int32, torch.int64]),
)
def test_teacher_as_topk_equals_the_local_one(reduction_and_metric, chunk_size, ids):
    reduction, metric = reduction_and_metric
    given = problem()
    options = {"loss": OF_SERVERS, "reduction": reduction, "metric": metric, "chunk_size": chunk_size}
    options["token_ids"] = torch.randint(V, given.mask.shape)
    expected, gradients = with_gradients(given, **options)
    remote, sent = from_server(given, ids)
    got, of_remote = with_gradients(remote, **sent, **options)
    check_counted(got, expected)
    exactly(got.loss, expected.loss)
    exactly(got.entropy, expected.entropy)
    check_gradients(of_remote, gradients)
    stats = reference.token_stats(*given.logits(), given.mask, k=K)
    rewards = opd_rewards(*stats[:4], mask=given.mask, strategy="intersection", weight=got.weight).rewards
    assert rewards.any()
    exactly(got.rewards, rewards)


# --- log-probabilities --------------------------------------------------------------------------------------------

SELECTED = {
    "plain": {}, "temperature": {"temperature": 0.7}, "vocabulary": {"vocab_size": 45}, "soft cap": {"softcap": 2.0}
}  # fmt: skip
FLOWS = {"both": (1.0, 0.1), "logprobs": (1.0, 0.0), "entropy": (0.0, 0.1)}


def selected(given, ids, impl, softcap=None, **options):
    """By the reference from all logits if `impl` is None."""
    if impl is None:
        logits = replace(given, student_softcap=softcap).side_logits("student_")
        return reference.selected_logprobs(logits, ids, given.mask, **options)
    hidden, weight, bias = (getattr(given, name) for name in STUDENT)
    return linear_selected_logprobs(hidden, weight, ids, given.mask, bias=bias, softcap=softcap, impl=impl, **options)


@pytest.mark.parametrize(
    ("options", "flows", "mask", "chunk_size", "impl", "dtype"),
    combinations(SELECTED, FLOWS, ["holes", "none", "nothing"], [1, 4, None], IMPLS,
                 [torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_selected_logprobs_against_all_logits(options, flows, mask, chunk_size, impl, dtype):
    """Duplicates and padding among the ids; gradients are summed in float32 and rounded once."""
    given = problem(dtype, mask=mask)
    ids = torch.randint(45, (3, T, 5), generator=torch.Generator().manual_seed(1))
    ids[..., 1], ids[0, :, 2] = ids[..., 0], -100
    results = []
    for one, more in ((given.to(torch.float64), {"impl": None}), (given, {"impl": impl, "chunk_size": chunk_size})):
        wanting, leaves = one.wanting(*STUDENT)
        out = selected(wanting, ids, **SELECTED[options], **more)
        loss = sum(factor * (x * x).sum() for x, factor in zip(out, FLOWS[flows], strict=False) if factor)
        results.append((out, torch.autograd.grad(loss, leaves)))
    (expected, exact_gradients), (got, gradients) = results
    assert not got.lse.requires_grad
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, exact_gradients, strict=True):
        assert one.dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(one.double(), other, rtol=unit, atol=1e-5 * (1 + other.abs().max().item()))


def test_selected_logprobs_of_what_is_frozen():
    given, ids = problem(), torch.randint(V, (3, T, 2))
    wanting, leaves = given.wanting(*STUDENT)
    expected = torch.autograd.grad(selected(wanting, ids, "reference").logprobs.sum(), leaves)
    for name, of_all in zip(STUDENT, expected, strict=True):
        wanting, leaves = given.wanting(name)
        check_gradients(torch.autograd.grad(selected(wanting, ids, "reference").logprobs.sum(), leaves), [of_all])
