"""The promise of one read: how often a training step reads each model's logits, and writes the gradient."""

from collections import Counter
from functools import partial

import pytest
import torch

import reads
from pruneopd_kernels import opd_loss, reliability, reverse_kl, selected_logprobs, topk_forward_kl, topk_policy_loss

WIDTHS = 1009, 1016
IDS, LOGPROBS = torch.arange(8).expand(2, 3, 8), torch.full((2, 3, 8), -3.0)
OPTIONS = {"k": 8, "vocab_size": WIDTHS[0]}


def scored_policy(student, teacher):
    scores = reliability(student, teacher, **OPTIONS)
    return topk_policy_loss(student, scores.topk_ids, scores.rewards)


def scored_kl(student, teacher):
    weight = reliability(student, teacher, **OPTIONS).weight
    return reverse_kl(student, teacher, weight=weight, vocab_size=WIDTHS[0])


def fused(student, teacher, **options):
    return opd_loss(student, teacher, **OPTIONS, **options).loss


def with_entropy(student, teacher):
    out = selected_logprobs(student, IDS)
    return out.logprobs.sum(-1) - 0.1 * out.entropy


# Reads of the student's and of the teacher's logits, and writes of the gradient.
STEPS = {
    "reliability, then topk_policy_loss": (scored_policy, "SSSTW"),
    "reliability, then reverse_kl": (scored_kl, "SSSTTTW"),
    "opd_loss by its candidates, and entropies": (partial(fused, entropies=True), "SSTW"),
    "opd_loss by reverse KL, and entropies": (partial(fused, loss="reverse_kl", entropies=True), "SSTTW"),
    "selected_logprobs and the entropy": (with_entropy, "SSW"),
    "topk_forward_kl": (lambda student, teacher: topk_forward_kl(student, IDS, LOGPROBS).loss, "SSW"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step(step):
    loss, expected = STEPS[step]
    student, teacher = (torch.randn(2, 3, width) for width in WIDTHS)
    student.requires_grad_()
    with reads.counted(*WIDTHS) as rows, reads.others(*WIDTHS) as others:
        losses = loss(student, teacher)
        (gradient,) = torch.autograd.grad(losses, student, torch.ones_like(losses))
    assert rows == {what: 6 * count for what, count in Counter(expected).items()} and gradient.any()
    assert not others


def test_anything_else_that_reads_logits_is_seen():
    student = torch.randn(2, 3, WIDTHS[0])
    with reads.counted(WIDTHS[0], None) as rows, reads.others(*WIDTHS) as others:
        student.double().softmax(-1)[..., 0].sum()
        opd_loss(student, student, k=2)
    assert others == {"aten::_to_copy": 12, "aten::_softmax": 12} and rows == {"S": 12}
