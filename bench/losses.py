"""The losses as they are timed: what they are given, and their passes.

"forward" computes the loss without autograd. "both" is what a training step pays: the public function under autograd,
then the gradient, which is allocated each time as it is in training. "backward" is the second half of it alone, on a
graph that is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import answers, data

# loss: whether it reads the teacher's logits too
LOSSES = {"topk_policy_loss": False, "topk_forward_kl": False, "reverse_kl": True}
PASSES = ("forward", "backward", "both")

Outputs = dict[str, Tensor]


def options(loss: str, dtype: str, k: int, shape: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """Everything that a loss takes besides logits, by name; its first axis is that of the logits."""
    if loss == "reverse_kl":
        return {"weight": data.weights(shape, device)}
    if loss == "topk_policy_loss":
        ids, _ = data.candidates("student", dtype, k, shape, device)
        return {"topk_ids": ids, "advantages": data.advantages(k, shape, device)}
    ids, logprobs = data.candidates("teacher", dtype, k, shape, device)
    return {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}


def options_like(loss: str, k: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The same without values, for their bytes."""
    with torch.device("meta"):
        ids, floats = torch.empty((*shape, k), dtype=torch.int64), torch.empty((*shape, k))
        return {
            "reverse_kl": {"weight": torch.empty(shape)},
            "topk_policy_loss": {"topk_ids": ids, "advantages": floats},
            "topk_forward_kl": {"teacher_topk_ids": ids, "teacher_topk_logprobs": floats},
        }[loss]


def call(
    function: Callable[..., object], passes: str, logits: Sequence[Tensor], given: Mapping[str, Any], upstream: Tensor
) -> Callable[[], Outputs]:
    """The call that is timed. `upstream` is the gradient of each position's loss."""
    if passes == "forward":
        return lambda: answers.fields(function(*logits, **given))
    student = logits[0].detach().requires_grad_()

    def both() -> Outputs:
        outputs = answers.fields(function(student, *logits[1:], **given))
        return outputs | _gradient(outputs["loss"], student, upstream)

    if passes == "both":
        return both
    loss = answers.fields(function(student, *logits[1:], **given))["loss"]
    return functools.partial(_gradient, loss, student, upstream, keep=True)


def _gradient(loss: Tensor, student: Tensor, upstream: Tensor, keep: bool = False) -> Outputs:
    (gradient,) = torch.autograd.grad(loss, student, upstream, retain_graph=keep)
    return {"gradient": gradient}


def belongs(field: str, passes: str) -> bool:
    """Whether this output comes out of these passes."""
    return passes in ("", "both") or (field == "gradient") == (passes == "backward")
