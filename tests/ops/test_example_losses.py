"""The losses of examples/losses.py against autograd on full logits in float64."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

import implementations
from pruneopd_kernels import SelectedLogprobs, selected_logprobs

SPEC = importlib.util.spec_from_file_location("losses", Path(__file__).parents[2] / "examples/losses.py")
losses = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(losses)


def on_full_logits(logits, token_ids):
    logprobs = logits.log_softmax(-1)
    return SelectedLogprobs(logprobs.gather(-1, token_ids), -(logprobs.exp() * logprobs).sum(-1), logits.logsumexp(-1))


LOSSES = [
    losses.topk_kl_with_tail,
    losses.reverse_kl_on_own_candidates,
    losses.jsd_over_candidates,
    losses.clipped_forward_kl,
    losses.sampled_policy_gradient,
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("impl", ["reference", *(["cpp"] if implementations.COMPILED else [])])
def test_equals_autograd_on_full_logits(loss, impl, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5, 300, generator=generator) * 2
    student = teacher + torch.randn(teacher.shape, generator=generator)
    ids = (student if loss is losses.reverse_kl_on_own_candidates else teacher).topk(8).indices
    if loss is losses.sampled_policy_gradient:
        ids = ids[..., 0]
    log_q = teacher.log_softmax(-1).gather(-1, ids.reshape(2, 5, -1)).view(ids.shape)

    def computed(selected, dtype):
        monkeypatch.setattr(losses, "selected_logprobs", selected)
        logits = student.to(dtype).requires_grad_()
        value = loss(logits, ids, log_q.to(dtype))
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

    expected = computed(on_full_logits, torch.float64)
    got = computed(functools.partial(selected_logprobs, impl=impl), torch.float32)
    assert all(torch.isfinite(x).all() for x in got)
    for ours, gold in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), gold, rtol=2e-5, atol=2e-6)
