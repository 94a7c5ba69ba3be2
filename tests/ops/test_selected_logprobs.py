import pytest
import torch

import cases
from implementations import each_of, quick
from operators import by_position

OP = "selected_logprobs"
_, check = by_position(OP)


@each_of(OP)
@pytest.mark.parametrize("m", [1, 2, 17, 512])
def test_numbers_of_ids(impl, m):
    """Also more than there are ids; as int32 too."""
    for width in (1, 40, 600):
        logits = cases.randn(3, width, seed=m)
        ids, _ = cases.candidates(logits, m)
        check(impl, None, logits, ids)
        check(impl, torch.tensor([1.0, 0.0, -2.0]), logits, ids.int(), temperature=0.5)


@each_of(OP, quick)
@pytest.mark.parametrize(("of_token", "of_entropy"), [(1.0, -0.1), (1.0, 0.0), (0.0, 1.0)])
def test_gradients_of_a_log_softmax(impl, of_token, of_entropy):
    """A policy gradient with an entropy bonus, and each of both alone: what autograd gives of full logits."""
    logits, advantages = cases.randn(2, 5, 300, seed=1), cases.randn(2, 5, seed=2, scale=1)
    logits[..., 7::9] = -torch.inf
    ids = torch.randint(300, (2, 5, 1))
    ids[0, :3] = torch.tensor([[7], [-100], [8]])

    def loss(logprobs, entropy):
        token = torch.where((ids < 0) | (logprobs == -torch.inf), 0.0, logprobs)[..., 0]
        terms = (of_token, advantages * token), (of_entropy, entropy)
        return sum(weight * term.sum() for weight, term in terms if weight)

    full = logits.double().requires_grad_()
    log_p = (full / 0.7).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    (expected,) = torch.autograd.grad(loss(log_p.gather(-1, ids.clamp(min=0)), entropy), full)
    leaf = logits.requires_grad_()
    out = impl.call(OP, logits=leaf, token_ids=ids, temperature=0.7)
    with impl.chosen():
        (gradient,) = torch.autograd.grad(loss(out.logprobs, out.entropy), leaf)
    torch.testing.assert_close(gradient.double(), expected.nan_to_num(0.0), rtol=1e-5, atol=1e-6)
    assert not gradient[0, 1].any() or of_entropy


@each_of(OP)
def test_what_is_not_finite(impl):
    """NaN in every id that exists, 0 beyond them; of a position that nothing flows into, 0."""
    logits, ids = cases.randn(5, 50, seed=6), torch.tensor([[5, -1, 20]] * 5)
    logits[0, 3], logits[1, 42], logits[2], logits[3, 20] = torch.nan, torch.inf, -torch.inf, -torch.inf
    out = check(impl, torch.ones(5), logits, ids, vocab_size=43)
    assert out.logprobs[:3, [0, 2]].isnan().all() and not out.logprobs[:, 1].any() and out.entropy[:3].isnan().all()
    assert out.logprobs[3, 2] == -torch.inf and out.lse[1] == torch.inf and out.lse[2] == -torch.inf
    gradient = out.gradient
    assert gradient[:3, :43].isnan().all() and not gradient[:, 43:].any() and gradient[3:].isfinite().all()
    assert not check(impl, torch.tensor([0.0, -0.0, 0.0, 0.0, 0.0]), logits, ids, vocab_size=43).gradient.any()
