"""Loads the compiled operators in the torch that runs this script, and compares them with the reference.

`make test-abi` runs it in two versions of torch on one build: python -m scripts.abi
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruneopd_kernels.dispatch import cuda  # which fills torch.ops.pruneopd, too


def main() -> None:
    """Compare every operator; end with a traceback at the first that differs or does not load."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 9, 1000, generator=generator)
    teacher = (student + torch.randn(student.shape, generator=generator)).bfloat16()
    mask = torch.rand(2, 9, generator=generator) < 0.8
    token_ids = torch.randint(1000, (2, 9), generator=generator)
    ids = torch.randint(30, (2, 2, 9, 16), generator=generator)
    logprobs = torch.randn(2, 9, 16, generator=generator).log_softmax(-1)
    advantages = torch.randn(2, 9, 16, generator=generator)

    calls = {
        "reliability": (student, teacher, mask),
        "token_stats": (student, teacher, mask, token_ids),
        "reliability_from_topk": (ids[0], ids[1], mask, logprobs, token_ids),
        "reliability_from_drift": (mask, None, None, torch.tensor([3, 0], dtype=torch.int32)),
    }
    losses = {
        "topk_policy_loss": (student, ids[0], advantages, mask, logprobs),
        "reverse_kl": (student, teacher, mask, advantages[..., 0]),
        "topk_forward_kl": (student, ids[1], logprobs, mask),
    }
    options = {"reliability": {"reward_weight": "teacher"}, "reliability_from_topk": {"metric": "top_p"}}
    for op, tensors in calls.items():
        outputs, expected = (raw(op)(*tensors, **options.get(op, {}), impl=impl) for impl in ("cpp", "reference"))
        compare(outputs, expected)
    for op, tensors in losses.items():
        compare(*(with_gradient(op, tensors, impl) for impl in ("cpp", "reference")))
    agree = ", ".join([*calls, *losses])
    print(f"torch {torch.__version__}: the library loads, and {agree} agree with the reference")
    if cuda.PATH.exists():
        torch.ops.load_library(cuda.PATH)
        print(f"torch {torch.__version__}: the library for {', '.join(cuda.architectures())} loads")


def raw(op: str) -> Any:
    return getattr(torch.ops.pruneopd, op)


def with_gradient(op: str, tensors: tuple[Tensor, ...], impl: str) -> list[Tensor]:
    """The outputs of a loss, and its gradient by the logits."""
    logits = tensors[0].clone().requires_grad_()
    outputs = raw(op)(logits, *tensors[1:], impl=impl)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [x.detach() for x in outputs] + [*torch.autograd.grad(outputs[0].sum(), logits)]


def compare(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


if __name__ == "__main__":
    main()
