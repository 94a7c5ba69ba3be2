import torch

from implementations import each_of, leaf, quick
from operators import example

OP = "selected_logprobs"


@each_of(OP, quick)
def test_gradients_of_either_output_add_up(impl):
    """The log-probabilities alone, the entropy alone, and both, as a policy gradient with an entropy bonus has them."""
    arguments = example(OP)
    logits = arguments[leaf(OP)].requires_grad_()
    out = impl.call(OP, **arguments)
    losses = (out.logprobs * torch.randn(out.logprobs.shape)).sum(), -0.1 * out.entropy.sum()
    with impl.chosen():
        alone = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
        (both,) = torch.autograd.grad(sum(losses), logits)
    torch.testing.assert_close(both, sum(alone), rtol=1e-5, atol=1e-6)
    assert all(gradient.any() for gradient in alone)


@each_of(OP, quick)
def test_gradients_that_cancel_do_not_hide_a_broken_row(impl):
    logits = torch.tensor([[[torch.inf, 0.5, -0.5]]], requires_grad=True)
    out = impl.call(OP, logits=logits, token_ids=torch.tensor([[[1, 2]]]))
    with impl.chosen():
        (gradient,) = torch.autograd.grad([out.logprobs], logits, torch.tensor([[[1.0, -1.0]]]))
    assert gradient.isnan().all()
