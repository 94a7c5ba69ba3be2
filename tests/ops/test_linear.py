"""`linear_reliability` and `linear_opd_loss`: the numbers, against the same with all logits at once."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from comparison import EPS, differing
from hidden_states import LOSSES, REDUCTIONS, H, K, T, V, loss_at_once, problem
from pruneopd_kernels import (
    Reliability,
    linear_opd_loss,
    linear_reliability,
    next_drift_count,
    opd_rewards,
    reference,
    reliability,
)

OPTIONS = {"k": K, "w_drop": 0.2}
IMPLS = ["reference", "cpp"]
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_chunk_size = pytest.mark.parametrize("chunk_size", [1, 3, None])
exactly = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
STUDENT = ("student_hidden", "student_weight", "student_bias")


def fields(out):
    return Reliability(*(getattr(out, name) for name in Reliability._fields))


def sum_of(out, scale):
    """What a backward pass starts from, whatever the reduction."""
    return out.loss if out.loss.ndim == 0 else (out.loss * scale).sum()


# --- reliability --------------------------------------------------------------------------------------------------


def by_chunks(given, chunk_size, **options):
    """`reliability` on logits computed by the same chunks, put together by hand."""
    shape = given.student_hidden.shape[:-1]
    count, dtype = shape.numel(), given.student_hidden.dtype
    rows = torch.arange(count).reshape(shape)
    valid = torch.ones(shape, dtype=torch.bool) if given.mask is None else given.mask
    ends = given.cu_seqlens.tolist() if len(shape) == 1 else [b * shape[1] for b in range(shape[0] + 1)]
    responses = [[int(i) for i in range(a, b) if valid.flatten()[i]] for a, b in itertools.pairwise(ends)]
    ordered = [(b, i) for b, response in enumerate(responses) for i in response]
    carry = torch.zeros(len(responses), dtype=torch.int32)
    out = {
        "overlap": torch.zeros(count), "drift": torch.zeros(count, dtype=torch.bool),
        "topk_ids": torch.arange(K).repeat(count, 1), "rewards": torch.zeros(count, K, dtype=max_dtype(dtype)),
    }  # fmt: skip
    heads = [(given.student_hidden, given.student_weight, given.student_bias),
             (given.teacher_hidden, given.teacher_weight, given.teacher_bias)]  # fmt: skip
    for start in range(0, len(ordered), chunk_size):
        chunk = ordered[start : start + chunk_size]
        index = torch.tensor([i for _, i in chunk])
        lengths = [sum(b == response for response, _ in chunk) for b in range(len(responses))]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        logits = []
        for hidden, weight, bias in heads:
            rows_of = hidden.reshape(-1, hidden.shape[-1])[index]
            logits.append(rows_of @ weight.T if bias is None else torch.addmm(bias, rows_of, weight.T))
        scored = reliability(*logits, cu_seqlens=cu_seqlens, drift_count=carry, **options)
        carry = next_drift_count(scored.drift_count, cu_seqlens, carry)
        for name in out:
            out[name][index] = getattr(scored, name)
    out = {name: x.reshape(*shape, *x.shape[1:]) for name, x in out.items()}
    along = reference.reliability_from_drift(out["drift"], given.mask, cu_seqlens=given.cu_seqlens, w_drop=0.2)
    assert rows.shape == along.drift_count.shape
    return Reliability(out["overlap"], out["drift"], *along, out["topk_ids"], out["rewards"])


def max_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["holes", "prefix", "none", "nothing", "packed", "packed with holes"])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_bits_of_reliability_on_the_same_logits(impl, dtype, layout, chunk_size):
    given = problem(dtype, mask="holes" if layout.endswith("holes") else "none" if "packed" in layout else layout)
    if layout.startswith("packed"):
        given = given.packed([5, 0, 7])
    expected = by_chunks(given, chunk_size, impl=impl, **OPTIONS)
    got = linear_reliability(**given.arguments(chunk_size=chunk_size, impl=impl, **OPTIONS))
    assert layout == "nothing" or 0 < expected.drift.sum() < expected.drift.numel()
    assert differing(expected, got) == []
    loss = linear_opd_loss(**given.arguments(chunk_size=chunk_size, impl=impl, **OPTIONS))
    assert differing(expected, fields(loss)) == []


@each_impl
@pytest.mark.parametrize("options", [
    {"metric": "top_p", "top_p": 0.5}, {"reward_weight": "teacher"}, {"student_temperature": 0.7},
    {"teacher_temperature": 2.0}, {"threshold": 0.5, "eps": 0.3, "w_base": 0.0}, {"drift_count": True},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_arguments_of_reliability_are_passed_on(impl, options):
    given = problem(torch.float32)
    options = dict(options)
    if "metric" in options:
        options["token_ids"] = torch.randint(V, given.mask.shape)
    if "drift_count" in options:
        options["drift_count"] = torch.tensor([0, 3, 1], dtype=torch.int32)
    expected = reference.reliability(*given.logits(), given.mask, **OPTIONS, **options)
    plain = reference.reliability(*given.logits(), given.mask, **OPTIONS)
    assert differing(expected, plain) != []
    got = linear_reliability(**given.arguments(chunk_size=4, impl=impl, **OPTIONS, **options))
    for name in ("overlap", "drift", "drift_count", "reliability", "weight", "effective_length", "topk_ids"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.rewards, expected.rewards, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0,)])
def test_empty_batches(shape):
    given = problem(torch.float32, mask="none")
    hidden, teacher = torch.zeros(*shape, H), torch.zeros(*shape, 5)
    cu_seqlens = torch.tensor([0], dtype=torch.int32) if len(shape) == 1 else None
    given = replace(given, student_hidden=hidden, teacher_hidden=teacher, cu_seqlens=cu_seqlens)
    for reduction in REDUCTIONS:
        wanting, leaves = given.wanting(*STUDENT)
        out = linear_opd_loss(**wanting.arguments(reduction=reduction, impl="reference", **OPTIONS))
        assert out.overlap.shape == out.entropy.shape == shape
        assert out.topk_ids.shape == (*shape, K)
        assert out.effective_length.shape == ((shape[0] if len(shape) == 2 else 0),)
        out.loss.sum().backward()
        assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
        assert not any(leaf.grad.any() for leaf in leaves)


def test_strides_of_hidden_states_are_free():
    given = problem(torch.float32)
    expected = linear_reliability(**given.arguments(chunk_size=4, impl="reference", **OPTIONS))
    wide = torch.randn(given.student_hidden.shape[0], T + 2, 2 * H)
    wide[:, 1:-1, ::2] = given.student_hidden
    strided = replace(given, student_hidden=wide[:, 1:-1, ::2])
    assert differing(expected, linear_reliability(**strided.arguments(chunk_size=4, impl="reference", **OPTIONS))) == []


# --- losses and gradients -----------------------------------------------------------------------------------------


@each_loss
@each_reduction
@each_chunk_size
@pytest.mark.parametrize("layout", ["holes", "none", "packed", "no bias"])
def test_losses_and_gradients_in_float64(loss, reduction, chunk_size, layout):
    given = problem(mask="none" if layout in ("none", "packed") else "holes", bias=layout != "no bias")
    if layout == "packed":
        given = given.packed([5, 0, 7])
    names = [name for name in STUDENT if getattr(given, name) is not None]
    wanting, leaves = given.wanting(*names)
    scale = torch.rand(given.student_hidden.shape[:-1], dtype=torch.float64)
    scale.view(-1)[-1] = 0.0
    value, scored = loss_at_once(loss, *wanting.logits(), given.mask, cu_seqlens=given.cu_seqlens, **OPTIONS)
    expected = torch.autograd.grad((scale * value).sum(), leaves)

    scaled = {"scale": scale} if reduction == "sum" else {}
    out = linear_opd_loss(
        **wanting.arguments(
            chunk_size=chunk_size, loss=loss, reduction=reduction, impl="reference", **scaled, **OPTIONS
        )
    )
    got = torch.autograd.grad(sum_of(out, scale), leaves)
    exactly(out.loss, (scale * value).sum() if reduction == "sum" else value)
    for name, one, other in zip(names, got, expected, strict=True):
        exactly(one, other, msg=lambda words, name=name: f"{name}: {words}")
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    assert torch.equal(out.drift_count, scored.drift_count)
    stats = reference.token_stats(*(x.detach() for x in wanting.logits()), given.mask, k=1)
    exactly(out.entropy, stats.student_entropy)


@each_loss
@each_reduction
@pytest.mark.parametrize("wanted", [STUDENT[:1], STUDENT[1:2], STUDENT[2:], STUDENT[:2], ()], ids=" ".join)
def test_what_is_frozen_gets_no_gradient(loss, reduction, wanted):
    given = problem()
    everything, leaves = given.wanting(*STUDENT)
    options = {"loss": loss, "reduction": reduction, "impl": "reference", "chunk_size": 4, **OPTIONS}
    expected = linear_opd_loss(**everything.arguments(**options)).loss
    gradients = dict(zip(STUDENT, torch.autograd.grad(expected.sum(), leaves), strict=True))

    wanting, leaves = given.wanting(*wanted)
    got = linear_opd_loss(**wanting.arguments(**options)).loss
    assert torch.equal(got, expected)
    assert got.requires_grad == bool(wanted)
    for name, gradient in zip(wanted, torch.autograd.grad(got.sum(), leaves) if wanted else (), strict=True):
        exactly(gradient, gradients[name])


@each_impl
@each_loss
@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_good_as_eagers(impl, loss, reduction, dtype):
    """At most twice the error that all logits at once have in the same dtype."""
    given = problem(dtype, seed=3, mask="holes", b=4, t=20, v=300)
    scale = torch.rand(given.mask.shape)

    def gradients(of):
        value, leaves = of
        return torch.autograd.grad(value, leaves)

    def at_once(given):
        wanting, leaves = given.wanting(*STUDENT)
        value, _ = loss_at_once(loss, *wanting.logits(), given.mask, **OPTIONS)
        return (scale.to(value.dtype) * value).sum(), leaves

    wanting, leaves = given.wanting(*STUDENT)
    scaled = {"scale": scale} if reduction == "sum" else {}
    options = {"chunk_size": 7, "loss": loss, "reduction": reduction, "impl": impl}
    out = linear_opd_loss(**wanting.arguments(**options, **scaled, **OPTIONS))
    got = gradients((sum_of(out, scale), leaves))
    gold, eager = gradients(at_once(given.to(torch.float64))), gradients(at_once(given))
    unit = torch.finfo(dtype).eps
    for name, one, exact, other in zip(STUDENT, got, gold, eager, strict=True):
        assert one.dtype == dtype
        error, eager_error = ((x.double() - exact).abs().max() for x in (one, other))
        assert error <= 2 * eager_error + 2 * max(unit, EPS) * exact.abs().max(), name


@each_loss
def test_sums_over_many_chunks_stay_good_in_half_precision(loss):
    """Summed in bfloat16 over 256 chunks, the head's gradient would stand still: a term is below half a unit of it."""
    given = problem(torch.bfloat16, seed=1, mask="none", b=4, t=64, v=40)
    wanting, leaves = given.wanting(*STUDENT)
    options = {"loss": loss, "reduction": "sum", "impl": "reference", **OPTIONS}
    linear_opd_loss(**wanting.arguments(chunk_size=1, **options)).loss.backward()
    one_by_one = [leaf.grad.float() for leaf in leaves]
    wanting, leaves = given.wanting(*STUDENT)
    linear_opd_loss(**wanting.arguments(chunk_size=256, **options)).loss.backward()
    for one, other in zip(one_by_one[1:], leaves[1:], strict=True):
        assert (one - other.grad.float()).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * one.abs().max()


@each_loss
@each_reduction
def test_heads_of_two_widths(loss, reduction):
    given = problem()
    wider = replace(
        given,
        teacher_weight=torch.cat([given.teacher_weight, 100 + torch.rand(9, 5, dtype=torch.float64)]),
        teacher_bias=torch.cat([given.teacher_bias, torch.zeros(9, dtype=torch.float64)]),
    )
    wanting, leaves = wider.wanting(*STUDENT)
    value, _ = loss_at_once(loss, *wanting.logits(), given.mask, vocab_size=45, **OPTIONS)
    expected = torch.autograd.grad(value.sum(), leaves)
    options = {"loss": loss, "reduction": reduction, "vocab_size": 45, "chunk_size": 4, "impl": "reference"}
    out = linear_opd_loss(**wanting.arguments(**options, **OPTIONS))
    got = torch.autograd.grad(out.loss.sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        exactly(one, other)
    assert not got[1][45:].any()
    assert got[1][:45].any()


@each_loss
@each_reduction
def test_temperatures(loss, reduction):
    given = problem()
    temperatures = {"student_temperature": 0.6, "teacher_temperature": 1.7}
    wanting, leaves = given.wanting(*STUDENT)
    value, _ = loss_at_once(loss, *wanting.logits(), given.mask, **temperatures, **OPTIONS)
    expected = torch.autograd.grad(value.sum(), leaves)
    options = {"loss": loss, "reduction": reduction, "chunk_size": 4, "impl": "reference"}
    out = linear_opd_loss(**wanting.arguments(**options, **temperatures, **OPTIONS))
    for one, other in zip(torch.autograd.grad(out.loss.sum(), leaves), expected, strict=True):
        exactly(one, other)
    cold = reference.token_stats(*(x.detach() for x in wanting.logits()), given.mask, k=1, **temperatures)
    exactly(out.entropy, cold.student_entropy)


@each_reduction
def test_scale_of_one_number(reduction):
    given = problem()
    scale = torch.tensor(0.25, dtype=torch.float64)
    wanting, leaves = given.wanting(*STUDENT)
    options = {"reduction": "sum", "chunk_size": 4, "impl": "reference", **OPTIONS}
    plain = linear_opd_loss(**wanting.arguments(**options)).loss
    scaled = linear_opd_loss(**wanting.arguments(scale=scale, **options)).loss
    exactly(scaled, 0.25 * plain)
    expected = torch.autograd.grad(0.25 * plain, leaves)
    for one, other in zip(torch.autograd.grad(scaled, leaves), expected, strict=True):
        exactly(one, other)


@each_loss
@each_reduction
def test_a_broken_row_stays_where_it_is(loss, reduction):
    """NaN in one position's hidden state is NaN in its loss and gradient; other positions' are as without it."""
    given = problem(mask="none")
    spoilt = replace(given, student_hidden=given.student_hidden.clone())
    spoilt.student_hidden[1, 4] = torch.nan
    grads = []
    for one in (given, spoilt):
        wanting, leaves = one.wanting("student_hidden")
        options = {"loss": loss, "reduction": "none", "chunk_size": 4, "impl": "reference", **OPTIONS}
        out = linear_opd_loss(**wanting.arguments(**options))
        out.loss.sum().backward()
        grads.append(leaves[0].grad)
    assert out.loss[1, 4].isnan()
    assert out.entropy[1, 4].isnan()
    assert grads[1][1, 4].isnan().all()
    exactly(grads[0][0], grads[1][0])
    exactly(grads[0][1, :4], grads[1][1, :4])
    # and where it has no part, it does not matter
    masked = replace(spoilt, mask=torch.ones(given.student_hidden.shape[:-1]))
    masked.mask[1, 4] = 0
    wanting, leaves = masked.wanting(*STUDENT)
    options = {"loss": loss, "reduction": reduction, "chunk_size": 4, "impl": "reference", **OPTIONS}
    linear_opd_loss(**wanting.arguments(**options)).loss.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@each_loss
@each_reduction
def test_what_has_no_weight_has_no_part(loss, reduction):
    """Where L is 0, a teacher's broken row gives a loss and a gradient of 0; so does a scale of 0, or a mask."""
    given = problem()
    given.teacher_hidden[1] = torch.nan
    drift_count = torch.tensor([0, 9, 0], dtype=torch.int32)
    options = {"loss": loss, "reduction": reduction, "chunk_size": 4, "impl": "reference", "k": K, "w_drop": 0.2}
    wanting, leaves = given.wanting(*STUDENT)
    out = linear_opd_loss(**wanting.arguments(w_base=0.0, drift_count=drift_count, **options))
    assert out.loss.isfinite().all()
    out.loss.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[0].grad[1].any()
    if reduction == "sum":
        scale = torch.where(given.mask, 1.0, torch.nan)
        scale[1] = 0.0
        wanting, leaves = given.wanting(*STUDENT)
        out = linear_opd_loss(**wanting.arguments(scale=scale, **options))
        assert out.loss.isfinite()
        out.loss.backward()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


# --- exhausted responses ------------------------------------------------------------------------------------------

EXHAUSTING = {"k": K, "w_drop": 0.5, "w_base": 0.0, "threshold": 0.9}  # R is 0 exactly, and not below


def exhausted_by_hand(given, **options):
    """The mask without what lies behind the first R of 0 of each response."""
    mask = torch.ones(given.student_hidden.shape[:-1], dtype=torch.bool) if given.mask is None else given.mask.clone()
    scored = reference.reliability(*(x.detach() for x in given.logits()), mask, **options)
    for response in range(mask.shape[0]):
        zeros = [t for t in range(mask.shape[1]) if mask[response, t] and scored.reliability[response, t] == 0]
        if zeros:
            mask[response, zeros[0] + 1 :] = False
    return mask


@each_loss
@each_reduction
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("mask", ["holes", "none"])
def test_skipping_exhausted_responses_is_masking_them(loss, reduction, chunk_size, mask):
    given = problem(mask=mask, t=12)
    by_hand = replace(given, mask=exhausted_by_hand(given, **EXHAUSTING))
    valid = given.student_hidden.shape[:-1].numel() if given.mask is None else int(given.mask.sum())
    assert 0 < by_hand.mask.sum() < valid
    options = {"loss": loss, "reduction": reduction, "impl": "reference", **EXHAUSTING}
    wanting, leaves = by_hand.wanting(*STUDENT)
    expected = linear_opd_loss(**wanting.arguments(chunk_size=chunk_size, **options))
    gradients = torch.autograd.grad(expected.loss.sum(), leaves)
    wanting, leaves = given.wanting(*STUDENT)
    got = linear_opd_loss(**wanting.arguments(chunk_size=chunk_size, skip_exhausted=True, **options))
    for name in ("overlap", "drift", "drift_count", "reliability", "weight", "effective_length", "topk_ids"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("loss", "entropy", "rewards"):
        exactly(getattr(got, name), getattr(expected, name))
    for one, other in zip(torch.autograd.grad(got.loss.sum(), leaves), gradients, strict=True):
        exactly(one, other)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_a_response_that_comes_exhausted_is_skipped_whole(chunk_size):
    given = problem(mask="none")
    drift_count = torch.tensor([0, 3, 1], dtype=torch.int32)
    out = linear_opd_loss(
        **given.arguments(chunk_size=chunk_size, skip_exhausted=True, drift_count=drift_count, impl="reference",
                          **EXHAUSTING)
    )  # fmt: skip
    assert out.drift_count[1].tolist() == [3] * T
    assert not out.entropy[1].any()
    assert out.topk_ids[1].tolist() == [list(range(K))] * T
    assert out.entropy[0].any()
    assert out.entropy[2].any()
    packed = given.packed([7, 7, 7])
    also = linear_opd_loss(
        **packed.arguments(chunk_size=chunk_size, skip_exhausted=True, drift_count=drift_count, impl="reference",
                           **EXHAUSTING)
    )  # fmt: skip
    for name in also._fields:
        one, other = getattr(also, name), getattr(out, name)
        exactly(one, other if name == "effective_length" else other.flatten(0, 1))


def test_without_drop_nothing_is_exhausted():
    given = problem()
    options = {"impl": "reference", "k": K, "w_base": 0.0, "w_drop": 0.0, "chunk_size": 4}
    expected = linear_opd_loss(**given.arguments(**options))
    assert differing(expected, linear_opd_loss(**given.arguments(skip_exhausted=True, **options))) == []


# --- a teacher's server -------------------------------------------------------------------------------------------


def from_server(given, logprobs=torch.float64, ids=torch.int64):
    """The problem without a teacher, and what a server sends for it."""
    stats = reference.token_stats(*(x.detach() for x in given.logits()), k=K)
    sent = {
        "teacher_topk_ids": stats.teacher_topk_ids.to(ids),
        "teacher_topk_logprobs": stats.teacher_topk_logprobs.to(logprobs),
    }
    return replace(given, teacher_hidden=None, teacher_weight=None, teacher_bias=None), sent


@each_reduction
@each_chunk_size
@pytest.mark.parametrize("metric", ["overlap", "top_p"])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_teacher_as_topk_equals_the_local_one(reduction, chunk_size, metric, ids):
    given = problem()
    options = {"loss": "topk_forward_kl", "reduction": reduction, "metric": metric, "chunk_size": chunk_size}
    options |= {"impl": "reference", "token_ids": torch.randint(V, given.mask.shape), **OPTIONS}
    wanting, leaves = given.wanting(*STUDENT)
    expected = linear_opd_loss(**wanting.arguments(**options))
    gradients = torch.autograd.grad(expected.loss.sum(), leaves)
    remote, sent = from_server(given, ids=ids)
    wanting, leaves = remote.wanting(*STUDENT)
    got = linear_opd_loss(**wanting.arguments(**sent, **options))
    for name in expected._fields:
        if name not in ("loss", "entropy", "rewards"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
    exactly(got.loss, expected.loss)
    exactly(got.entropy, expected.entropy)
    for one, other in zip(torch.autograd.grad(got.loss.sum(), leaves), gradients, strict=True):
        exactly(one, other)
    stats = reference.token_stats(*given.logits(), given.mask, k=K)
    rewards = opd_rewards(*stats[:4], mask=given.mask, strategy="intersection", weight=got.weight).rewards
    assert rewards.any()
    exactly(got.rewards, rewards)


def test_a_broken_row_agrees_with_no_server():
    given = problem(mask="none")
    given.student_hidden[1, 4] = torch.nan
    remote, sent = from_server(given)
    sent["teacher_topk_ids"][1, 4] = torch.arange(K)  # what a row of NaN has for its first candidates
    sent["teacher_topk_logprobs"][1, 4] = -1.0
    for options in ({}, {"metric": "top_p", "token_ids": torch.zeros(3, T, dtype=torch.int64)}):
        out = linear_opd_loss(
            **remote.arguments(**sent, loss="topk_forward_kl", chunk_size=4, impl="reference", **OPTIONS, **options)
        )
        assert out.overlap[1, 4] == 0
        assert out.drift[1, 4]
        assert out.loss[1, 4].isnan()


def test_server_and_exhausted_responses():
    given = problem(mask="none", t=12)
    remote, sent = from_server(given)
    mask = exhausted_by_hand(given, **EXHAUSTING)
    options = {"loss": "topk_forward_kl", "impl": "reference", "chunk_size": 5, **EXHAUSTING}
    expected = linear_opd_loss(**replace(remote, mask=mask).arguments(**sent, **options))
    got = linear_opd_loss(**remote.arguments(**sent, skip_exhausted=True, **options))
    assert 0 < mask.sum() < mask.numel()
    exactly(got.loss, expected.loss)
    assert torch.equal(got.drift_count, expected.drift_count)
