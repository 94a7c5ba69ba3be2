import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import cases
from cases import sent
from implementations import each_of
from operators import by_position, examples
from topk_forward_kl import TAILS

OP = "topk_forward_kl"
run, check = by_position(OP)


@each_of(OP)
@pytest.mark.parametrize("tail", ["bucket", "generalised"])
def test_with_a_tail_it_is_a_divergence(impl, tail):
    """It is never negative. At p = q the loss and its gradient are 0, so that a perfect student stays as it is."""

    @examples(impl, seed=st.integers(0, 2**31), k=st.sampled_from([1, 5, 30]), noise=st.sampled_from([0.0, 1e-3, 1.0]))
    def holds(seed, k, noise):
        student = cases.randn(4, 30, seed=seed)
        ids, log_q = sent(student + noise * cases.randn(4, 30, seed=seed + 1), k)
        outputs, gradient = run(impl, None, student, ids, log_q, tail=tail)
        assert (outputs.loss >= 0).all()
        assert noise or ((outputs.loss < 2e-7).all() and gradient.abs().max() < 1e-6)


@each_of(OP)
def test_raised_to_logprob_min(impl):
    """A log p below it, here one of -ln 4 or of -inf, is raised and has no gradient. The masses are as they were."""
    student = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 0.0]])
    ids, log_q = torch.tensor([[0, 2, 1, -1]]), torch.tensor([[-1.0, -2.0, -40.0, -1.0]])
    for minimum, learns in ((-3.0, True), (-0.5, False)):
        result = check(impl, None, student, ids, log_q, logprob_min=minimum, tail="none")
        np.testing.assert_allclose(result.student_mass, [0.5], rtol=1e-6)
        assert result.gradient.any() == learns and result.gradient[0, 2] == 0


@each_of(OP)
def test_padding(impl):
    """An id below 0, whatever is sent with it, or one with a log-probability of -inf, though the id comes twice."""
    student = cases.randn(2, 40, seed=3)
    ids, log_q = sent(student + cases.randn(2, 40, seed=4), 6, with_padding=False)
    padding = [((-1, -100), value) for value in (torch.nan, 0.0, torch.inf, -torch.inf)]
    padding += [((0, 0), -torch.inf), ((int(ids[0, 0]), -1), -torch.inf)]
    for (slots, value), logprob_min, tail in itertools.product(padding, (None, -8.0), TAILS):
        ids[:, 4:], log_q[:, 4:] = torch.tensor(slots), value
        check(impl, None, student, ids, log_q, logprob_min=logprob_min, tail=tail)
    ids[:], student[1, 3] = -1, torch.nan
    for logprob_min in (None, -8.0):
        loss = check(impl, None, student, ids, log_q, logprob_min=logprob_min).loss
        assert loss[0] == 0 and loss[1].isnan()  # a broken row has no loss even without a candidate
