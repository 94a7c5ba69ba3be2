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
    for upstream in (1.0, 0.0, -0.0):
        upstream = torch.full((9,), upstream)
        result = check(impl, upstream, student, teacher, weight=weight, vocab_size=43)
        assert result.loss.isnan().tolist() == [True] * 6 + [False, True, False] and result.loss[6] == -torch.inf
        assert result.gradient[:8, :43].isnan().all() == upstream.any()
    for without in ({"weight": torch.tensor([0.0, -0.0] * 4 + [1.0])}, {"mask": torch.arange(9) == 8}):
        result = check(impl, None, student, teacher, vocab_size=43, **without)
        assert result.loss.isfinite().all() and result.gradient.isfinite().all()  # whatever it would have been
    result = check(impl, None, student[8:], teacher[8:], weight=torch.tensor([3e38]), vocab_size=43)
    assert result.loss == torch.inf and result.gradient[0, :43].isnan().all()  # too large for a float32
