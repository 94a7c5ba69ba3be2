import pytest
import torch

import cases
from implementations import each_of
from operators import answer_of_sample, by_position, sample

OP = "reverse_kl"
_, check = by_position(OP)


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
    expected = torch.from_numpy(answer_of_sample(OP, name, (cases.F32, cases.F32), 0).gold["gradient"])
    assert ((gradient - expected).abs() <= 2e-5 * magnitudes + 1e-36).all()


@each_of(OP)
def test_broken_rows_without_a_weight_have_no_part(impl):
    student, teacher = cases.randn(4, 50, seed=6), cases.randn(4, 50, seed=7)
    student[0, 3], student[1, 42], teacher[2, 0] = torch.nan, torch.inf, torch.nan
    result = check(impl, None, student, teacher, weight=torch.tensor([0.0, -0.0, 0.0, 1.0]))
    assert result.loss.isfinite().all() and result.gradient.isfinite().all()
