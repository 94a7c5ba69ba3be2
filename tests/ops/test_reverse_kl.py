import functools

import hypothesis
import hypothesis.strategies as st
import loss_cases
import numpy as np
import pytest
import torch
from loss_cases import generator

import cases
import comparison
from implementations import LOSS_IMPLEMENTATIONS, every_loss_implementation

OP = "reverse_kl"
WEIGHT = torch.tensor([[1.5, -0.75, 0.0], [0.6, 700.0, 1.0]])


def run(impl, *args, **kwargs):
    return impl.loss(OP, *args, **kwargs)


def check(impl, *args, **kwargs):
    loss_cases.check(impl, OP, *args, **kwargs)


@functools.cache
def calls(name, dtypes):
    """Without and with a weight: `upstream, student, teacher`, `kwargs`, and the answers."""
    student, teacher, kwargs = cases.make(name, dtypes)
    kwargs = {argument: value for argument, value in kwargs.items() if argument != "k"}
    args = cases.randn(*student.shape[:-1], seed=30, scale=1), student, teacher
    return [(args, more, *loss_cases.answers(OP, *args, **more)) for more in (kwargs, kwargs | {"weight": WEIGHT})]


@every_loss_implementation
@pytest.mark.parametrize(("name", "dtypes"), cases.TABLE, ids=cases.case_id)
def test_table(impl, name, dtypes):
    for args, kwargs, answer, eager in calls(name, dtypes):
        comparison.check_loss(run(impl, *args, **kwargs), answer, eager)


@every_loss_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_full_width(impl, dtype):
    student, teacher = cases.randn(2, 151936, seed=20).to(dtype), cases.randn(2, 152064, seed=21).to(dtype)
    check(impl, torch.tensor([0.5, -2.0]), student, teacher, vocab_size=151936)


@every_loss_implementation
@pytest.mark.parametrize("name", ["random", "temperatures", "strongly_negative", "shifted_apart", "both_underflow"])
def test_small_probabilities_have_their_digits(impl, name):
    """Not only what is large in a gradient: each element of it, down to where float32 ends."""
    (args, kwargs, answer, _), _ = calls(name, (cases.F32, cases.F32))
    _, gradient = run(impl, *args, **kwargs)
    log_p = loss_cases.logprobs(args[1], kwargs.get("student_temperature", 1.0))
    log_q = loss_cases.logprobs(args[2], kwargs.get("teacher_temperature", 1.0))
    scale = (args[0] / kwargs.get("student_temperature", 1.0)).abs()[..., None]
    magnitudes = scale * log_p.exp() * (log_p.abs() + log_q.abs() + 1)
    errors = (gradient - torch.from_numpy(answer.gradient)).abs()
    worst = (errors - 2e-5 * magnitudes).flatten().argmax()
    assert errors.flatten()[worst] <= 2e-5 * magnitudes.flatten()[worst] + 1e-36


@every_loss_implementation
@pytest.mark.parametrize("offset", [-450.0, 0.0, 30.0])
def test_what_is_left_beside_a_peak_is_not_rounded_away(impl, offset):
    """Beside a mass of 1, each of the others is less than float32 can add; all the divergence is in them."""
    student = torch.full((1, 512), offset)
    teacher = student.clone()
    student[0, 0] += 17.5
    teacher[0, 0] += 12.0
    answer, _ = loss_cases.answers(OP, torch.ones(1), student, teacher)
    outputs, gradient = run(impl, None, student, teacher)
    np.testing.assert_allclose(outputs.loss, answer.outputs["loss"], rtol=1e-4)
    np.testing.assert_allclose(gradient, answer.gradient, rtol=1e-4)


# --- rules -----------------------------------------------------------------------------------------------------------


@every_loss_implementation
def test_by_hand(impl):
    student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    outputs, gradient = run(impl, torch.tensor([2.0]), student, teacher, weight=torch.tensor([3.0]))
    kl = 0.25 * np.log(2)  # (0.5 - 0.25) ln 2
    by_logits = [0.5 * (np.log(2) - kl), 0.25 * (0 - kl), 0.25 * (-np.log(2) - kl)]
    np.testing.assert_allclose(outputs.loss, [3 * kl], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[6 * x for x in by_logits]], rtol=1e-6)


@every_loss_implementation
def test_equal_rows_are_at_the_minimum(impl):
    student = (cases.randn(4, 700, seed=1) * 64).round() / 64  # for exact sums
    outputs, gradient = run(impl, None, student, student + torch.tensor([[0.0], [64.0], [-512.0], [0.5]]))
    assert (outputs.loss >= 0).all() and outputs.loss.max() < 1e-5
    assert gradient.abs().max() < 1e-6


@every_loss_implementation
def test_a_token_that_is_masked_out(impl):
    """By both sides: it is as if it were not there. By the student alone: no part. By the teacher alone: +inf."""
    student, teacher = cases.randn(3, 40, seed=1), cases.randn(3, 40, seed=2)
    student[0, 5], teacher[0, 5], student[1, 5], teacher[2, 5] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    outputs, gradient = run(impl, None, student, teacher)
    others = torch.arange(40) != 5
    fewer, of_fewer = run(impl, None, student[:, others], teacher[:, others])
    torch.testing.assert_close(outputs.loss[0], fewer.loss[0])
    torch.testing.assert_close(gradient[0, others], of_fewer[0])
    assert gradient[0, 5] == 0 and gradient[1, 5] == 0 and gradient[1].isfinite().all() and gradient[1].any()
    assert outputs.loss[2] == torch.inf and gradient[2].isnan().all()


@every_loss_implementation
def test_what_is_not_finite(impl):
    """NaN in every id that exists, 0 beyond them; and 0 everywhere where nobody asks for the gradient."""
    student, teacher = cases.randn(9, 50, seed=6), cases.randn(9, 60, seed=7)
    student[0, 3], student[1, 42], student[2] = torch.nan, torch.inf, -torch.inf
    teacher[3, 0], teacher[4, 9], teacher[5] = torch.nan, torch.inf, -torch.inf
    teacher[6, 20] = -torch.inf
    weight = torch.ones(9)
    weight[6], weight[7] = -1.0, torch.nan
    upstream = torch.ones(9)
    outputs, gradient = run(impl, upstream, student, teacher, weight=weight, vocab_size=43)
    assert outputs.loss.isnan().tolist() == [True] * 6 + [False, True, False]
    assert outputs.loss[6] == -torch.inf and outputs.loss[8].isfinite()
    assert gradient[:8, :43].isnan().all() and not gradient[:, 43:].any() and gradient[8].isfinite().all()
    for zero in (0.0, -0.0):
        _, gradient = run(impl, torch.full((9,), zero), student, teacher, weight=weight, vocab_size=43)
        assert not gradient.any()  # no NaN either
    outputs, gradient = run(impl, None, student[8:], teacher[8:], weight=torch.tensor([3e38]), vocab_size=43)
    assert outputs.loss == torch.inf and gradient[0, :43].isnan().all()  # too large for a float32


@every_loss_implementation
def test_a_divergence_that_is_masked_or_has_no_weight(impl):
    """Whatever it would have been."""
    student, teacher = cases.randn(4, 50, seed=6), cases.randn(4, 50, seed=7)
    student[0, 3], teacher[1, 4], teacher[2, 5] = torch.nan, torch.inf, -torch.inf
    for kwargs in ({"weight": torch.tensor([0.0, -0.0, 0.0, 1.0])}, {"mask": torch.tensor([0, 0, 0, 1])}):
        outputs, gradient = run(impl, None, student, teacher, **kwargs)
        assert not outputs.loss[:3].any() and not gradient[:3].any()
        assert outputs.loss[3] > 0 and gradient[3].any()


@every_loss_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_weight(impl, dtype):
    student, teacher = cases.randn(2, 3, 80, seed=1), cases.randn(2, 3, 80, seed=2)
    check(impl, torch.ones(2, 3), student, teacher, weight=WEIGHT.to(dtype))


@every_loss_implementation
def test_roundings_of_ties_do_not_add_up(impl):
    """Five different logits: where a lane adds the same value again and again, each rounding goes the same way."""
    rng = generator(1)
    student, teacher = (torch.randn(3, 499, generator=rng).mul(1000).round() / 1000 + 300 for _ in range(2))
    check(impl, torch.ones(3), student.bfloat16(), teacher, student_temperature=3.0)


# --- invariants ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)


@every_loss_implementation
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_random_against_gold(impl, data):
    """Any width, dtypes, mask and temperatures; quantised logits, so that much ties; some special values."""
    width = data.draw(st.integers(1, 1600), "width")
    rng = generator(data.draw(seeds, "seed"))
    step = data.draw(st.sampled_from([1e-3, 0.25, 1.0, 8.0]), "step")
    scale = data.draw(st.sampled_from([0.1, 1.0, 10.0]), "scale")
    offset = data.draw(st.sampled_from([0.0, -450.0, 300.0]), "offset")
    pair = [(torch.randn(3, width, generator=rng) * scale / step).round() * step + offset for _ in range(2)]
    for special in data.draw(st.lists(st.sampled_from([-torch.inf, -torch.inf, torch.inf, torch.nan]), max_size=2)):
        pair[data.draw(st.integers(0, 1))][torch.rand(3, width, generator=rng) < 1.0 / width] = special
    dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    student, teacher = (x.to(data.draw(dtype)) for x in pair)
    kwargs = {
        "mask": torch.rand(3, generator=rng) < 0.8,
        "student_temperature": data.draw(st.sampled_from([1.0, 0.5, 3.0])),
        "teacher_temperature": data.draw(st.sampled_from([1.0, 0.8])),
    }
    if data.draw(st.booleans(), "weighted"):
        kwargs["weight"] = torch.rand(3, generator=rng) - 0.3
    check(impl, torch.randn(3, generator=rng), student, teacher, **kwargs)


@every_loss_implementation
@hypothesis.given(seed=seeds, factor=st.sampled_from([0.25, 2.0, -1.0, 1024.0]))
def test_scaling_upstream_or_weight(impl, seed, factor):
    """By a power of two: exactly."""
    rng = generator(seed)
    student, teacher = torch.randn(2, 400, generator=rng) * 2, torch.randn(2, 400, generator=rng)
    upstream, weight = torch.tensor([1.5, -0.75]), torch.tensor([0.25, 3.0])
    before, gradient = run(impl, upstream, student, teacher, weight=weight)
    same, scaled = run(impl, upstream * factor, student, teacher, weight=weight)
    assert comparison.same_bits([same.loss, scaled + 0.0], [before.loss, gradient * factor + 0.0])  # -0.0 is 0.0
    scaled_loss, scaled = run(impl, upstream, student, teacher, weight=weight * factor)
    assert comparison.same_bits([scaled_loss.loss, scaled + 0.0], [before.loss * factor, gradient * factor + 0.0])


@every_loss_implementation
@hypothesis.given(
    seed=seeds, student_shift=st.sampled_from([-1024, -3, 700]), teacher_shift=st.sampled_from([64, -512])
)
def test_shifting_a_row_by_a_constant(impl, seed, student_shift, teacher_shift):
    rng = generator(seed)
    student, teacher = ((torch.randn(2, 600, generator=rng) * 256).round() / 64 for _ in range(2))
    before, gradient = run(impl, None, student, teacher)
    after, shifted = run(impl, None, student + student_shift, teacher + teacher_shift)  # exact: a multiple of 1/64
    torch.testing.assert_close(after.loss, before.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(shifted, gradient, rtol=2e-6, atol=2e-6)


@every_loss_implementation
@hypothesis.given(seed=seeds, factor=st.sampled_from([0.25, 2.0, 3.0, 1024.0]))
def test_scaling_logits_and_temperature_together(impl, seed, factor):
    """The gradient by logits that are so many times as large is as many times smaller."""
    rng = generator(seed)
    student, teacher = (torch.randn(2, 600, generator=rng) * 4 for _ in range(2))
    before, gradient = run(impl, None, student, teacher, student_temperature=0.75, teacher_temperature=1.5)
    temperatures = {"student_temperature": 0.75 * factor, "teacher_temperature": 1.5 * factor}
    after, scaled = run(impl, None, student * factor, teacher * factor, **temperatures)
    torch.testing.assert_close(after.loss, before.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(scaled * factor, gradient, rtol=2e-6, atol=2e-6)


@every_loss_implementation
@hypothesis.given(seed=seeds, noise=st.sampled_from([0.0, 1e-6, 1e-3]), shift=st.sampled_from([0.0, -450.0]))
def test_never_negative(impl, seed, noise, shift):
    rng = generator(seed)
    student = torch.randn(4, 500, generator=rng)
    outputs, _ = run(impl, None, student, student + noise * torch.randn(4, 500, generator=rng) + shift)
    assert (outputs.loss >= 0).all() and outputs.loss.max() < 1e-5


# --- finite differences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", LOSS_IMPLEMENTATIONS[:2], ids=repr)
def test_gradcheck(impl):
    student, teacher = cases.randn(3, 12, seed=1).double(), cases.randn(3, 14, seed=2).double()
    student[1, 4], student[2, 3], teacher[2, 3] = -torch.inf, -torch.inf, -torch.inf
    kwargs = {
        "mask": torch.tensor([True, False, True]),
        "weight": torch.tensor([0.5, 1.0, -2.0]),
        "student_temperature": 0.6,
        "teacher_temperature": 1.7,
        "vocab_size": 11,
    }
    finite = student.isfinite()

    def loss(free):
        return impl.call(OP, student.masked_scatter(finite, free), teacher, **kwargs)

    assert torch.autograd.gradcheck(loss, student[finite].requires_grad_())
