"""What every loss promises of its numbers: a row's loss and gradient depend on that row alone, wherever it lies."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import comparison
from implementations import LOSSES, REFERENCE, REFERENCE_OPERATOR, every_compiled, every_loss_implementation
from loss_cases import example, generator

every_loss = pytest.mark.parametrize("op", LOSSES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)
seeds = st.integers(0, 2**31)


def computed(impl, op, upstream, arguments, **kwargs):
    """Outputs and gradient, all in one tuple."""
    outputs, gradient = impl.loss(op, upstream, **arguments, **kwargs)
    return (*outputs, gradient)


def each(function, tensors):
    if isinstance(tensors, dict):
        return {name: function(x) for name, x in tensors.items()}
    return tuple(map(function, tensors))


# --- shapes and strides ----------------------------------------------------------------------------------------------


@every_loss_implementation
@every_loss
def test_any_leading_axes(impl, op):
    arguments, upstream = example(op, (2, 3, 4), 40), torch.randn(2, 3, 4)
    arguments["mask"][1, 2, 3] = True
    whole = computed(impl, op, upstream, arguments)
    assert whole[0].shape == (2, 3, 4) and whole[-1].shape == (2, 3, 4, 40)
    flat = computed(impl, op, upstream.flatten(), each(lambda x: x.flatten(0, 2), arguments))
    assert comparison.same_bits(each(lambda x: x.unflatten(0, (2, 3, 4)), flat), whole)
    one = computed(impl, op, upstream[1, 2, 3], each(lambda x: x[1, 2, 3], arguments))
    assert one[0].shape == ()
    assert comparison.same_bits(one, each(lambda x: x[1, 2, 3], whole))


@every_loss_implementation
@every_loss
@each_dtype
def test_strides(impl, op, dtype):
    """Rows at any address and of any distance, axes in another order, gaps: the bits of contiguous tensors."""
    arguments, upstream = example(op, (3, 5), 600, dtype=dtype), torch.randn(3, 5)
    expected = computed(impl, op, upstream, arguments)

    def among_others(x):
        """In larger memory, at an odd offset, without the last of more positions, the first axis innermost of two."""
        wide = torch.full((x.shape[1] + 1, x.shape[0], *x.shape[2:-1], x.shape[-1] + 9), -7).to(x.dtype)
        if x.ndim == 2:
            wide = torch.full((x.shape[1] + 1, x.shape[0], 3), -7).to(x.dtype)
            view = wide[:-1, :, 1].transpose(0, 1)
        else:
            view = wide[:-1, :, 1 : x.shape[-1] + 1].transpose(0, 1)
        return view.copy_(x)

    strided = each(among_others, arguments)
    assert not any(x.is_contiguous() for x in strided.values())
    assert comparison.same_bits(computed(impl, op, among_others(upstream), strided), expected)
    spread = {n: x if "logits" in n else x[..., None].repeat_interleave(2, -1)[..., 1] for n, x in arguments.items()}
    assert comparison.same_bits(computed(impl, op, upstream, spread), expected)


@every_loss_implementation
@every_loss
def test_all_positions_are_one_in_memory(impl, op):
    arguments = example(op, (), 700, seed=3)
    arguments["mask"] = torch.tensor(True)
    one = computed(impl, op, torch.tensor(0.5), arguments)
    expanded = computed(impl, op, torch.tensor(0.5).expand(2, 3), each(lambda x: x.expand(2, 3, *x.shape), arguments))
    assert comparison.same_bits(expanded, each(lambda x: x.expand(2, 3, *x.shape), one))


@every_loss_implementation
@every_loss
def test_upstream_as_sum_and_mean_hand_it_back(impl, op):
    """One number with strides of 0."""
    arguments = example(op, (4, 5), 70)
    expected = computed(impl, op, torch.full((4, 5), 0.05), arguments)
    assert comparison.same_bits(computed(impl, op, torch.tensor(0.05).expand(4, 5), arguments), expected)


@every_loss_implementation
@every_loss
@each_dtype
def test_gradient_is_like_the_logits(impl, op, dtype):
    arguments = example(op, (2, 3), 65, dtype=dtype)
    gradient = computed(impl, op, None, arguments)[-1]
    assert gradient.dtype == dtype and gradient.shape == (2, 3, 65) and gradient.is_contiguous()


@every_loss_implementation
@every_loss
def test_ids_that_do_not_exist(impl, op):
    """Logits beyond vocab_size are not read and get a gradient of 0."""
    arguments, upstream = example(op, (3, 4), 64), torch.randn(3, 4)
    expected = computed(impl, op, upstream, arguments)

    def widened(x):
        more = torch.tensor([torch.nan, torch.inf, 1e9, -torch.inf, 50.0]).expand(3, 4, 5)
        return torch.cat([x, more], -1)

    wide = {name: widened(x) if "logits" in name else x for name, x in arguments.items()}
    *outputs, gradient = computed(impl, op, upstream, wide, vocab_size=64)
    assert not gradient[..., 64:].any()
    for got, wanted in zip([*outputs, gradient[..., :64]], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


# --- rows that do not count ------------------------------------------------------------------------------------------


@every_loss_implementation
@every_loss
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masked_positions(impl, op, dtype):
    """Nothing of them is read, whatever is in them; what comes for them is 0, and the gradient too."""
    arguments = example(op, (2, 6), 70)
    mask = (torch.arange(12).view(2, 6) % 3 != 1).to(dtype) * (1 if dtype == torch.bool else 2)
    arguments["mask"] = mask
    expected = computed(impl, op, None, arguments)
    for name, x in arguments.items():
        if name != "mask":
            x[mask == 0] = torch.nan if x.is_floating_point() else 2**31 - 1
    result = computed(impl, op, None, arguments)
    assert comparison.same_bits(result, expected)
    for x in result:
        assert not x[mask == 0].is_floating_point() or not x[mask == 0].any()
    assert result[-1][mask != 0].any(-1).all()


@every_loss_implementation
@every_loss
@hypothesis.given(seed=seeds)
def test_masking_is_removing(impl, op, seed):
    arguments = example(op, (9,), 300, seed=seed)
    mask, upstream = arguments.pop("mask"), torch.randn(9, generator=generator(seed))
    masked = computed(impl, op, upstream, arguments | {"mask": mask})
    removed = computed(impl, op, upstream[mask], each(lambda x: x[mask], arguments))
    assert comparison.same_bits(each(lambda x: x[mask], masked), removed)


@every_loss_implementation
@every_loss
def test_nobody_asks_for_the_gradient_of_some(impl, op):
    """Where upstream is 0, of either sign, so is the gradient; beside them it is what it was."""
    arguments, upstream = example(op, (8,), 200), torch.randn(8)
    arguments["mask"][:] = True
    plain = computed(impl, op, upstream, arguments)[-1]
    upstream[::3] = torch.tensor([0.0, -0.0, 0.0])
    arguments["student_logits"][0, 5] = torch.nan
    gradient = computed(impl, op, upstream, arguments)[-1]
    assert not gradient[::3].any() and torch.equal(gradient[1::3], plain[1::3]) and gradient[1::3].any(-1).all()


@every_loss_implementation
@every_loss
def test_an_upstream_of_nan_is_seen(impl, op):
    arguments, upstream = example(op, (3,), 50), torch.tensor([1.0, torch.nan, 1.0])
    arguments["mask"][:] = True
    gradient = computed(impl, op, upstream, arguments)[-1]
    assert gradient.isnan().any(-1).tolist() == [False, True, False] and gradient[1].isnan().all()


# --- what is linear --------------------------------------------------------------------------------------------------


@every_loss_implementation
@every_loss
@hypothesis.given(seed=seeds, factor=st.sampled_from([0.25, 2.0, -1.0, 1024.0]))
def test_scaling_upstream(impl, op, seed, factor):
    """By a power of two: exactly."""
    arguments, upstream = example(op, (3,), 400, seed=seed), torch.randn(3, generator=generator(seed))
    *before, gradient = computed(impl, op, upstream, arguments)
    *after, scaled = computed(impl, op, upstream * factor, arguments)
    assert comparison.same_bits(after, before)
    assert torch.equal(scaled, gradient * factor)


@every_loss_implementation
@every_loss
@hypothesis.given(seed=seeds, temperature=st.sampled_from([0.25, 1.0, 7.0]))
def test_a_row_s_gradient_sums_to_0(impl, op, seed, temperature):
    """Adding a constant to a row changes no probability; what is left of the sum is rounding."""
    arguments = example(op, (3,), 700, seed=seed)
    arguments.pop("old_logprobs", None)  # with which a row may be clipped as a whole
    arguments["mask"][:] = True
    gradient = computed(impl, op, None, arguments, student_temperature=temperature)[-1].double()
    size = gradient.abs().sum(-1)
    assert (gradient.sum(-1).abs() <= 16 * comparison.EPS * size).all() and size.all()


# --- determinism -----------------------------------------------------------------------------------------------------


@every_loss_implementation
@every_loss
@each_dtype
def test_same_bits_from_run_to_run_and_in_any_batch(impl, op, dtype):
    arguments, upstream = example(op, (64,), 1033, m=24, dtype=dtype), torch.randn(64)
    if op == "topk_policy_loss":
        arguments["topk_ids"][:, 12:] = arguments["topk_ids"][:, :12]  # duplicates, whose sum has an order
    whole = computed(impl, op, upstream, arguments)
    assert comparison.same_bits(computed(impl, op, upstream, arguments), whole)
    for part in (slice(0, 1), slice(1, 3), slice(37, 64)):
        alone = computed(impl, op, upstream[part], each(lambda x, part=part: x[part], arguments))
        assert comparison.same_bits(alone, each(lambda x, part=part: x[part], whole))


@every_compiled
@every_loss
def test_same_bits_from_any_number_of_threads(impl, op, two_threads):
    arguments, upstream = example(op, (37,), 2000, m=24), torch.randn(37)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(computed(impl, op, upstream, arguments))
    assert [comparison.same_bits(results[0], result) for result in results[1:]] == [True] * 3


@every_compiled
@every_loss
def test_the_mode_of_floating_point_is_left_as_it_is(impl, op, two_threads):
    """Flushing of subnormals, as fast kernels like it, ends with the call, in every thread; the backward's too."""
    small = torch.full((1 << 20,), 1e-40)
    computed(impl, op, None, example(op, (64,), 4000))
    assert torch.equal(small * 1.0, small) and (small * 0.5 > 0).all()


# --- the two definitions ---------------------------------------------------------------------------------------------


@every_loss_implementation
@every_loss
def test_implementations_agree_with_the_definition(impl, op):
    """Where nothing is special, to a few of the last digits."""
    arguments, upstream = example(op, (4, 5), 900, m=16), torch.randn(4, 5)
    for got, wanted in zip(
        computed(impl, op, upstream, arguments), computed(REFERENCE, op, upstream, arguments), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


@every_loss
def test_the_two_definitions_agree(op):
    """The reference through autograd and its two passes: to the last digits of a float64."""
    arguments, upstream = each(doubled, example(op, (4, 5), 90)), torch.randn(4, 5).double()
    for got, wanted in zip(
        computed(REFERENCE_OPERATOR, op, upstream, arguments),
        computed(REFERENCE, op, upstream, arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def doubled(x):
    return x.double() if x.is_floating_point() else x
