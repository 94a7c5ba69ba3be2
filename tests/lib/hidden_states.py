"""Problems for the tests of the functions from hidden states, and the same computed from all logits at once."""

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from pruneopd_kernels import linear_opd_loss, reference
from pruneopd_kernels.linear.linear_opd_loss import Loss

B, T, V, K = 3, 7, 50, 4
H, TEACHER_H = 6, 5
LOSSES = list(get_args(Loss))
OF_SERVERS = LOSSES[-1]  # which needs no more of the teacher than its candidates
REDUCTIONS = ["none", "sum"]
STUDENT = ("student_hidden", "student_weight", "student_bias")
OPTIONS = {"k": K, "w_drop": 0.2}


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
    student_softcap: float | None = None
    teacher_softcap: float | None = None

    def arguments(self, **more):
        """Those of a call, by the reference in chunks of 4 unless `more` says otherwise."""
        return vars(self) | {"impl": "reference", "chunk_size": 4, **OPTIONS} | more

    def wanting(self, *names):
        """The same with these tensors as leaves that want a gradient, and those leaves."""
        leaves = {name: getattr(self, name).detach().clone().requires_grad_() for name in names}
        return replace(self, **leaves), list(leaves.values())

    def each(self, change):
        """The same with `change(tensor)` in place of each floating-point tensor."""
        floats = {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and x.is_floating_point()}
        return replace(self, **{name: change(x) for name, x in floats.items()})

    def to(self, dtype):
        return self.each(lambda x: x.to(dtype))

    def logits(self):
        """Of both sides in float32, or float64: half-precision operands are made float32 first."""
        return [self.side_logits(f"{side}_") for side in ("student", "teacher")]

    def side_logits(self, prefix):
        hidden, weight, bias, cap = (getattr(self, prefix + name) for name in ("hidden", "weight", "bias", "softcap"))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if bias is None else bias.to(wide)
        logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), bias)
        return logits if cap is None else cap * (logits / cap).tanh()

    def packed(self, *lengths):
        """The first positions of the responses, end to end."""
        rows = torch.cat([torch.arange(n) + b * self.student_hidden.shape[1] for b, n in enumerate(lengths)])
        names = [name for name in ("student_hidden", "teacher_hidden", "mask") if getattr(self, name) is not None]
        flat = {name: getattr(self, name).flatten(0, 1)[rows] for name in names}
        return replace(self, **flat, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())


def problem(dtype=torch.float64, seed=0, bias=True, mask="holes", b=B, t=T, v=V):
    """Two heads that agree now and then, because the teacher sees most of what the student sees."""
    rng = torch.Generator().manual_seed(seed)

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


def total(loss, scale=None):
    """What a backward pass starts from, whatever the reduction."""
    return loss.sum() if scale is None or loss.ndim == 0 else (scale.to(loss.dtype) * loss).sum()


def with_gradients(given, wanted=None, scale=None, **options):
    """The result of `linear_opd_loss`, and the gradients of its `total` by what is wanted: all that there is."""
    wanted = [name for name in STUDENT if getattr(given, name) is not None] if wanted is None else wanted
    wanting, leaves = given.wanting(*wanted)
    scaled = {"scale": scale} if options.get("reduction") == "sum" else {}
    out = linear_opd_loss(**wanting.arguments(**scaled, **options))
    return out, torch.autograd.grad(total(out.loss, scale), leaves) if wanted else ()


def loss_at_once(loss, student, teacher, mask, tail="bucket", **options):
    """The loss of each position and the scores, by the reference from all logits."""
    policy = {} if loss == OF_SERVERS else {"loss": loss}
    scored = reference.opd_loss(student, teacher, mask, entropies=True, **policy, **options)
    if policy:
        return scored.loss, scored
    weight, names = options.get("weight"), ("student_temperature", "vocab_size")
    of_student = {name: options[name] for name in names if name in options}
    stats = {name: options[name] for name in ("k", *names, "teacher_temperature") if name in options}
    of_teacher = reference.token_stats(student.detach(), teacher, mask, **stats)[2:4]
    value = reference.topk_forward_kl(student, *of_teacher, mask, tail=tail, **of_student).loss
    weight = scored.weight if weight is None else weight
    return torch.where(weight == 0, 0.0, weight * value), scored


def at_once(given, loss, scale=None, **options):
    """The loss of each position, the scores and the gradients, from all logits."""
    wanting, leaves = given.wanting(*(name for name in STUDENT if getattr(given, name) is not None))
    options = {"cu_seqlens": given.cu_seqlens, **OPTIONS, **options}
    value, scored = loss_at_once(loss, *wanting.logits(), given.mask, **options)
    return value.detach(), scored, torch.autograd.grad(total(value, scale), leaves)


def from_server(given, ids=torch.int64):
    """The problem without a teacher, and what a server sends for it."""
    stats = reference.token_stats(*(x.detach() for x in given.logits()), k=K)
    sent = {
        "teacher_topk_ids": stats.teacher_topk_ids.to(ids), "teacher_topk_logprobs": stats.teacher_topk_logprobs
    }  # fmt: skip
    return replace(given, teacher_hidden=None, teacher_weight=None, teacher_bias=None), sent
