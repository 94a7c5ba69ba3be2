import numpy as np
import pytest
import torch

import cases
from cases import candidates, moved
from implementations import each_of
from operators import by_position

OP = "topk_policy_loss"
run, check = by_position(OP)


@each_of(OP)
@pytest.mark.parametrize("m", [1, 2, 17, 512])
def test_numbers_of_candidates(impl, m):
    """Also more than there are ids."""
    for width in (1, 40, 600):
        student = cases.randn(3, width, seed=m)
        ids, advantages = candidates(student, m)
        check(impl, torch.ones(3), student, ids, advantages)
        check(impl, torch.ones(3), student, ids.int(), advantages, old_logprobs=moved(student, ids))


def one_candidate(impl, advantage, log_ratio, **clips):
    """Loss and derivative by log p of one candidate whose log p is exactly 0: the only token."""
    candidate, old = (torch.tensor([[0]]), torch.tensor([[advantage]])), torch.tensor([[-log_ratio]])
    outputs, _ = run(impl, None, torch.tensor([[0.0, -torch.inf]]), *candidate, old_logprobs=old, **clips)
    # Of two equal ones the derivative shows: by the first logit it is half of that by log p.
    old = torch.tensor([[0.5]]).log() - log_ratio
    _, gradient = run(impl, None, torch.zeros(1, 2), *candidate, old_logprobs=old, **clips)
    return outputs.loss.item(), 2 * gradient[0, 0].item()


@each_of(OP)
def test_a_clipped_ratio_has_no_gradient(impl):
    for advantage, log_ratio, loss, derivative in [
        (1.0, 0.5, -1.2, 0.0),  # gained enough
        (1.0, -0.5, -np.exp(-0.5), -np.exp(-0.5)),  # the pessimistic one is the unclipped
        (-1.0, 0.5, np.exp(0.5), np.exp(0.5)),
        (-1.0, -0.5, 0.8, 0.0),
        (-1.0, 1.2, 3.0, 0.0),  # dual
        (1.0, 1.2, -1.2, 0.0),
        (1.0, -30.0, -np.exp(-20.0), 0.0),  # clamped, which the gradient does not pass
        (1.0, -19.0, -np.exp(-19.0), -np.exp(-19.0)),
    ]:
        got = one_candidate(impl, advantage, log_ratio)
        np.testing.assert_allclose(got, (loss, derivative), rtol=1e-6, err_msg=f"{advantage}, {log_ratio}")
    loss, derivative = one_candidate(impl, -1.0, 30.0, clip_dual=float("inf"))
    np.testing.assert_allclose((loss, derivative), (np.exp(20.0), 0.0), rtol=1e-6)


@each_of(OP)
@pytest.mark.parametrize("clips", [{}, {"clip_low": 0.0, "clip_high": 0.0}], ids=str)
def test_on_ties_the_gradient_is_the_unclipped_one_s(impl, clips):
    """On-policy every ratio is 1: with both clips 0, the clipped and the unclipped are equal for every candidate."""
    student = cases.randn(2, 50, seed=3)
    ids, advantages = torch.randint(50, (2, 8)), torch.randn(2, 8)
    outputs, gradient = run(impl, None, student, ids, advantages, **clips)
    np.testing.assert_allclose(outputs.loss, -advantages.double().sum(-1), rtol=1e-6)
    leaf = student.double().requires_grad_()
    (-(advantages * leaf.log_softmax(-1).gather(-1, ids))).sum().backward()
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5, atol=1e-7)


@each_of(OP)
def test_what_is_not_finite(impl):
    """NaN in every id that exists, 0 beyond them; and 0 everywhere where nobody asks for the gradient."""
    student = cases.randn(8, 50, seed=6)
    student[0, 3], student[1, 49 - 7], student[2] = torch.nan, torch.inf, -torch.inf
    ids, advantages, old = torch.randint(40, (8, 4)), torch.randn(8, 4), torch.full((8, 4), -4.0)
    advantages[3, 1], advantages[4, 2], old[5, 0] = torch.nan, torch.inf, torch.nan
    advantages[6, 3] = 3e38
    old[6, 3] = -30.0  # -3e38 * 1.2 is no float32
    for upstream in (1.0, 0.0, -0.0):
        upstream = torch.full((8,), upstream)
        result = check(impl, upstream, student, ids, advantages, old_logprobs=old, vocab_size=43)
        assert result.loss.isnan().tolist() == [True] * 4 + [False, True, False, False]
        assert result.loss[[4, 6]].isinf().all() and result.gradient[:7, :43].isnan().all() == upstream.any()


@each_of(OP)
def test_an_infinite_old_logprob_is_a_ratio_at_the_clamp(impl):
    student, ids, advantages = cases.randn(2, 50, seed=6), torch.tensor([[3], [4]]), torch.tensor([[1.0], [-1.0]])
    old = torch.tensor([[torch.inf], [-torch.inf]])
    outputs, gradient = run(impl, None, student, ids, advantages, old_logprobs=old)
    np.testing.assert_allclose(outputs.loss, [-np.exp(-20.0), 3.0], rtol=1e-6)
    assert not gradient.any()
