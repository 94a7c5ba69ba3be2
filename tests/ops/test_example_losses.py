"""The losses of examples/losses.py against autograd on full logits in float64."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

import cases
from pruneopd_kernels import SelectedLogprobs, selected_logprobs

SPEC = importlib.util.spec_from_file_location("losses", Path(__file__).parents[2] / "examples/losses.py")
losses = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(losses)


def on_full_logits(logits, token_ids):
    logprobs = logits.log_softmax(-1)
    return SelectedLogprobs(logprobs.gather(-1, token_ids), -(logprobs.exp() * logprobs).sum(-1), logits.logsumexp(-1))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("name", ["topk_kl_with_tail", "reverse_kl_on_own_candidates", "jsd_over_candidates",
                                  "clipped_forward_kl", "sampled_policy_gradient"])  # fmt: skip
def test_equals_autograd_on_full_logits(name, impl, monkeypatch):
    rng = cases.generator(0)
    teacher = torch.randn(2, 5, 300, generator=rng) * 2
    student = teacher + torch.randn(teacher.shape, generator=rng)
    ids = (student if name == "reverse_kl_on_own_candidates" else teacher).topk(8).indices
    ids = ids[..., 0] if name == "sampled_policy_gradient" else ids
    log_q = teacher.log_softmax(-1).gather(-1, ids.reshape(2, 5, -1)).view(ids.shape)

    def computed(selected, dtype):
        monkeypatch.setattr(losses, "selected_logprobs", selected)
        logits = student.to(dtype).requires_grad_()
        value = getattr(losses, name)(logits, ids, log_q.to(dtype))
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

    expected = computed(on_full_logits, torch.float64)
    got = computed(functools.partial(selected_logprobs, impl=impl), torch.float32)
    for ours, gold in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), gold, rtol=2e-5, atol=2e-6)
