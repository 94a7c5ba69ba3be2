"""Problems for the tests of the operators from hidden states, and the same computed with the logits all at once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruneopd_kernels import reference

B, T, V, K = 3, 7, 50, 4
H, TEACHER_H = 6, 5
LOSSES = ["topk_policy", "reverse_kl", "topk_forward_kl"]
REDUCTIONS = ["none", "sum"]


@dataclass
class Problem:
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def arguments(self, **more):
        return vars(self) | more

    def wanting(self, *names):
        """The same with these tensors as leaves that want a gradient, and those leaves."""
        leaves = {name: getattr(self, name).detach().clone().requires_grad_() for name in names}
        return replace(self, **leaves), list(leaves.values())

    def to(self, dtype):
        floats = {name: x.to(dtype) for name, x in vars(self).items() if x is not None and x.is_floating_point()}
        return replace(self, **floats)

    def logits(self):
        return (
            torch.nn.functional.linear(self.student_hidden, self.student_weight, self.student_bias),
            torch.nn.functional.linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias),
        )

    def packed(self, lengths):
        """The first positions of the responses, end to end."""
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        rows = torch.cat([torch.arange(n) + b * self.student_hidden.shape[1] for b, n in enumerate(lengths)])

        def flat(x):
            return None if x is None else x.flatten(0, 1)[rows]

        return replace(
            self, student_hidden=flat(self.student_hidden), teacher_hidden=flat(self.teacher_hidden),
            mask=flat(self.mask), cu_seqlens=ends,
        )  # fmt: skip


def problem(dtype=torch.float64, seed=0, bias=True, mask="holes", **shape):
    """Two heads that agree now and then, since the teacher sees most of what the student sees."""
    rng = torch.Generator().manual_seed(seed)
    b, t, v = shape.get("b", B), shape.get("t", T), shape.get("v", V)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden, weight = randn(b, t, H), randn(v, H)
    teacher = hidden[..., :TEACHER_H] + 0.3 * randn(b, t, TEACHER_H)
    masks = {
        "holes": torch.rand(b, t, generator=rng) < 0.7,
        "prefix": torch.arange(t) < torch.randint(t + 1, (b, 1), generator=rng),
        "none": None,
        "nothing": torch.zeros(b, t, dtype=torch.bool),
    }
    return Problem(
        hidden, weight, teacher, weight[:, :TEACHER_H].clone(),
        randn(v) if bias else None, randn(v) / 4 if bias else None, masks[mask],
    ).to(dtype)  # fmt: skip


def loss_at_once(loss, student, teacher, mask, vocab_size=None, **options):
    """The loss of each position and the reliability, by the reference from all logits."""
    temperatures = {name: options.pop(name) for name in list(options) if name.endswith("temperature")}
    of_student = {name: x for name, x in temperatures.items() if name.startswith("student")}
    scored = reference.reliability(student.detach(), teacher, mask, vocab_size=vocab_size, **temperatures, **options)
    cut = {"vocab_size": vocab_size}
    if loss == "topk_policy":
        value = reference.topk_policy_loss(student, scored.topk_ids, scored.rewards, mask, **of_student, **cut)
    elif loss == "reverse_kl":
        value = reference.reverse_kl(student, teacher, mask, weight=scored.weight, **temperatures, **cut)
    else:
        stats = reference.token_stats(student.detach(), teacher, mask, k=options["k"], **temperatures, **cut)
        ids, logprobs = stats.teacher_topk_ids, stats.teacher_topk_logprobs
        value = reference.topk_forward_kl(student, ids, logprobs, mask, **of_student, **cut).loss
        value = torch.where(scored.weight == 0, 0.0, scored.weight * value)
    return value, scored
