import numpy as np
import torch

import cases
from implementations import each_of
from operators import by_position

OP = "topk_policy_loss"
run, check = by_position(OP)


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
def test_on_ties_the_gradient_is_the_unclipped_one_s(impl):
    """On-policy every ratio is 1: with both clips 0, the clipped and the unclipped are equal for every candidate."""
    student = cases.randn(2, 50, seed=3)
    ids, advantages = torch.randint(50, (2, 8)), torch.randn(2, 8)
    for clips in ({}, {"clip_low": 0.0, "clip_high": 0.0}):
        check(impl, None, student, ids, advantages, **clips)
