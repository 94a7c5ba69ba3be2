import pytest
import torch

import cases
from cases import generator
from implementations import each_of
from operators import answer_of_sample, by_position, sample

OP = "reverse_kl"
run, check = by_position(OP)


@each_of(OP)
@pytest.mark.parametrize("name", ["random", "temperatures", "strongly_negative", "shifted_apart", "both_underflow"])
def test_small_probabilities_have_their_digits(impl, name):
    """Not only what is large in a gradient: each element of it, down to where float32 ends."""
    upstream, arguments = sample(OP, name, (cases.F32, cases.F32), 0)
    gradient = impl.run(OP, upstream, **arguments)["gradient"]
    temperature = arguments.get("student_temperature", 1.0)
    log_p = cases.logprobs(arguments["student_logits"], temperature)
    log_q = cases.logprobs(arguments["teacher_logits"], arguments.get("teacher_temperature", 1.0))
    magnitudes = (upstream / temperature).abs()[..., None] * log_p.exp() * (log_p.abs() + log_q.abs() + 1)
    expected = answer_of_sample(OP, name, (cases.F32, cases.F32), 0).gold["gradient"]
    errors = (gradient - torch.from_numpy(expected)).abs()
    worst = (errors - 2e-5 * magnitudes).flatten().argmax()
    assert errors.flatten()[worst] <= 2e-5 * magnitudes.flatten()[worst] + 1e-36


@each_of(OP)
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
    for without in ({"weight": torch.tensor([0.0, -0.0] * 4 + [1.0])}, {"mask": torch.arange(9) == 8}):
        outputs, gradient = run(impl, None, student, teacher, vocab_size=43, **without)
        assert not outputs.loss[:8].any() and not gradient[:8].any()  # whatever it would have been
        assert outputs.loss[8] > 0 and gradient[8].any()
    for zero in (0.0, -0.0):
        _, gradient = run(impl, torch.full((9,), zero), student, teacher, weight=weight, vocab_size=43)
        assert not gradient.any()  # no NaN either
    outputs, gradient = run(impl, None, student[8:], teacher[8:], weight=torch.tensor([3e38]), vocab_size=43)
    assert outputs.loss == torch.inf and gradient[0, :43].isnan().all()  # too large for a float32


@each_of(OP)
def test_roundings_of_ties_do_not_add_up(impl):
    """Five different logits: where a lane adds the same value again and again, each rounding goes the same way."""
    rng = generator(1)
    student, teacher = (torch.randn(3, 499, generator=rng).mul(1000).round() / 1000 + 300 for _ in range(2))
    check(impl, torch.ones(3), student.bfloat16(), teacher, student_temperature=3.0)
