"""Every operator on every implementation, held to its gold: outputs and gradients within their error budget."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import cases
import comparison
import operators
from implementations import DECLARED, LOGITS, LOSSES, REFERENCE, each, leaf, named, quick, references, temperature
from operators import MODULES, example, of_positions

OF_CANDIDATES = [op for op in LOSSES if {"token_ids", "topk_ids", "teacher_topk_ids"} & {*DECLARED[op].tensors[:2]}]


@operators.each_sample()
def test_table(op, impl, case, dtypes, variant):
    upstream, arguments = operators.sample(op, case, dtypes, variant)
    comparison.check(impl.run(op, upstream, **arguments), operators.answer_of_sample(op, case, dtypes, variant))


@pytest.mark.fuzz
@each()
def test_random_calls(op, impl):
    @operators.examples(impl, arguments=operators.calls(op))
    def holds(arguments):
        operators.check(impl, op, least_size=0.0 if op in LOSSES else 1.0, **arguments)


@pytest.mark.parametrize("case", ["random", "strongly_negative", "peaked", "both_underflow", "wide_range"])
@each(OF_CANDIDATES)
def test_small_probabilities_have_their_digits(op, impl, case):
    """Not only what is large in a gradient: each element of it, down to where float32 ends."""
    key = op, case, (cases.F32, cases.F32), 0
    upstream, arguments = operators.sample(*key)
    gradient, gold = impl.run(op, upstream, **arguments)["gradient"], operators.answer_of_sample(*key).gold["gradient"]
    ids = next(arguments[name] for name in arguments if name.endswith("_ids")).clamp(min=0)
    others = torch.ones_like(gradient, dtype=torch.bool).scatter(-1, ids, False)
    np.testing.assert_allclose(gradient[others], gold[others], rtol=2e-5, atol=4e-36)


@each(OF_CANDIDATES)
def test_most_candidates(op, impl):
    """As int32. In a vocabulary with fewer ids they repeat, if they may."""
    for width in (40, 600):
        logits, most = cases.randn(1, 3, width), 256 if op == "topk_forward_kl" else 512
        given = {leaf(op): logits} | MODULES[op].tensors(logits, -logits, most, 0, (1.0, 1.0), None)
        operators.check(impl, op, **{name: x.int() if name.endswith("ids") else x for name, x in given.items()})


@each(LOSSES)
def test_what_is_not_finite(op, impl):
    """NaN in every id that exists where there is no loss, 0 beyond them; 0 everywhere if nobody asks for a gradient."""
    arguments = example(op, (1, 12), 43) | {"mask": None, "vocab_size": 43}
    arguments |= {n: torch.nn.functional.pad(x, (0, 7)) for n, x in arguments.items() if n.endswith("logits")}
    floats = [name for name in of_positions(arguments) if arguments[name].is_floating_point()]
    for t, (name, value) in enumerate(itertools.product(floats, (torch.nan, torch.inf, -torch.inf, 3e38))):
        x = arguments[name][0, t]
        x.view(-1)[: 43 if name.endswith("logits") and value < 0 else 1] = value  # of a whole row, or of one
    for upstream in (1.0, 0.0, -0.0):
        gradient = operators.check(impl, op, torch.full((1, 12), upstream), **arguments)["gradient"]
        assert gradient[0, :3, :43].isnan().all() == bool(upstream) and not gradient[..., 43:].any()


@each(["token_stats", "reverse_kl"])
@pytest.mark.parametrize("offset", [-450.0, 0.0, 30.0])
def test_what_is_left_beside_a_peak_is_not_rounded_away(op, impl, offset):
    """Beside a mass of 1, each of the others is less than float32 can add; all entropy and divergence is in them."""
    logits = torch.full((1, 512), offset)
    peak = torch.arange(512) == 0
    for by_teacher, names in ((18.0, ["student_entropy", "teacher_entropy"]), (12.0, ["loss", "gradient"])):
        arguments = {"student_logits": logits + 17.5 * peak, "teacher_logits": logits + by_teacher * peak}
        result, gold = impl.run(op, **arguments), operators.answer(op, **arguments).gold
        for name in [name for name in names if name in result]:
            rtol = 1e-5 if op == "token_stats" else 1e-4
            np.testing.assert_allclose(result[name], gold[name], rtol=rtol, err_msg=name)


@each(["token_stats", "reverse_kl"])
def test_divergences_are_never_negative(op, impl):
    shifts, noises = st.sampled_from([0.0, -450.0]), st.sampled_from([0.0, 1e-6, 1e-3])

    @operators.examples(impl, seed=st.integers(0, 2**31), noise=noises, shift=shifts)
    def holds(seed, noise, shift):
        student, more = torch.randn(2, 4, 500, generator=cases.generator(seed))
        result = impl.run(op, student_logits=student, teacher_logits=student + noise * more + shift)
        for name in {"loss", "reverse_kl", "forward_kl"} & set(result):
            assert (result[name] >= 0).all(), name
            assert name == "forward_kl" or result[name].max() < 1e-5  # this small, it is lost in rounding

    student = cases.randn(64, 40, scale=1)
    result = impl.run(op, student_logits=student, teacher_logits=student + 1 / 3)  # but for rounding, the same
    assert all((result[name] >= 0).all() for name in {"loss", "reverse_kl", "forward_kl"} & set(result))


@each(LOSSES)
def test_dtypes_of_what_comes_with_the_logits(op, impl):
    """What is given as float64, bfloat16 or float16 counts as it is."""
    arguments = example(op, (1, 3), 80)
    floats = [n for n in of_positions(arguments) if arguments[n].is_floating_point() and not n.endswith("logits")]
    for name, dtype in itertools.product(floats, (torch.float64, torch.bfloat16, torch.float16)):
        operators.check(impl, op, **arguments | {name: arguments[name].to(dtype)})


@each(LOSSES, references)
def test_finite_differences(op, impl):
    arguments = in_float64(example(op, (1, 3), 11, k=6))
    beyond, options = torch.full((1, 3, 1), torch.nan).double(), {temperature(op): 0.6, "vocab_size": 11}

    def differentiable(free):
        logits = torch.cat([free, beyond], -1)
        outputs = named(impl.call(op, **arguments | options | differences(op) | {leaf(op): logits}))
        return tuple(outputs[name] for name in DECLARED[op].differentiable)

    assert torch.autograd.gradcheck(differentiable, arguments[leaf(op)].clone().requires_grad_())


def in_float64(arguments):
    return {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in arguments.items()}


def differences(op):
    """Arguments with which a finite difference is what the gradient says."""
    return getattr(MODULES[op], "FINITE_DIFFERENCES", {})


@pytest.mark.parametrize("op", LOSSES)
def test_the_two_definitions_agree(op):
    """The reference through autograd and its two passes: to the last digits of a float64. It has second derivatives."""
    arguments = in_float64(example(op, (4, 5), 90))
    one, two = (impl.run(op, torch.rand(4, 5).double() * 0 + 0.3, **arguments) for impl in references(op))
    for name in one:
        assert one[name].dtype == two[name].dtype
        torch.testing.assert_close(one[name], two[name], rtol=1e-12, atol=1e-13)
    few = in_float64(example(op, (1, 2), 9, k=6)) | {"mask": None} | differences(op)

    def differentiable(logits):
        outputs = named(REFERENCE.call(op, **few | {leaf(op): logits}))
        return tuple(outputs[name] for name in DECLARED[op].differentiable)

    assert torch.autograd.gradgradcheck(differentiable, few[leaf(op)].requires_grad_())


@pytest.mark.parametrize("op", LOGITS)
def test_float64_in_the_reference(op):
    """Results stay float64, except what no sum over logits gives."""
    float32 = getattr(MODULES[op], "FLOAT32", ())
    given = example(op)
    arguments = {name: x.double() if name.endswith("logits") else x for name, x in given.items()}
    of_float32 = REFERENCE.run(op, **given)
    for impl in references(op):
        for name, x in impl.run(op, **arguments).items():
            if x.is_floating_point():
                assert x.dtype == (torch.float32 if name in float32 else torch.float64), name
            wanted = of_float32[name]
            torch.testing.assert_close(x.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@each(implementations=quick)
def test_whole_numbers_are_floats_too(op, impl):
    """`threshold=1, w_drop=0` as anyone writes it."""
    whole = {"threshold": 1, "w_drop": 1, "w_base": 0, "eps": 0, "top_p": 1, "student_temperature": 2}
    whole |= {"clip_low": 1, "clip_high": 0, "clip_dual": 2, "logprob_min": -3}
    whole = operators.of_op(op, whole)
    floats = {name: float(value) for name, value in whole.items()}
    results = [impl.run(op, **example(op) | options) for options in (whole, floats)]
    assert comparison.differing(*results) == []
