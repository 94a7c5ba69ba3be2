"""Loads the compiled operators in the torch that runs this script, and compares them with the reference.

`make test-abi` runs it in two versions of torch on one build: python -m scripts.abi
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruneopd_kernels.dispatch import cuda, registration  # noqa: F401 (fills torch.ops.pruneopd)
from pruneopd_kernels.ops import OPERATORS

SCALARS = {"reward_weight": "teacher", "metric": "top_p"}  # texts cross the ABI


def main() -> None:
    """Compare every operator; end with a traceback at the first that differs or does not load."""
    tensors = arguments()
    for name, op in OPERATORS.items():
        given = [tensors.get(tensor) for tensor in op.tensors]
        if name == "selected_logprobs":
            given[:2] = tensors["student_logits"], tensors["topk_ids"]
        scalars = {scalar: SCALARS[scalar] for scalar in op.scalars if scalar in SCALARS}
        outputs = [
            call(name, given, differentiable=bool(op.saved), impl=impl, **scalars) for impl in ("cpp", "reference")
        ]
        for output, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    print(f"torch {torch.__version__}: the library loads, and {', '.join(OPERATORS)} agree with the reference")
    if cuda.PATH.exists():
        torch.ops.load_library(cuda.PATH)
        print(f"torch {torch.__version__}: the library for {', '.join(cuda.architectures())} loads")


def arguments() -> dict[str, Tensor]:
    """Return a value for each tensor that an operator may take, by the name of the parameter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    student = torch.randn(2, 9, 1000, generator=generator)
    student_ids, teacher_ids = random(2, 2, 9, 60).topk(16).indices
    student_logprobs, teacher_logprobs = random(2, 2, 9, 16).log_softmax(-1)
    return {
        "student_logits": student,
        "teacher_logits": (student + torch.randn(student.shape, generator=generator)).bfloat16(),
        "mask": random(2, 9) < 0.8,
        "drift": random(2, 9) < 0.3,
        "drift_count": torch.tensor([3, 0], dtype=torch.int32),
        "token_ids": torch.randint(60, (2, 9), generator=generator),
        "topk_ids": student_ids,
        "student_topk_ids": student_ids,
        "teacher_topk_ids": teacher_ids,
        "student_topk_logprobs": student_logprobs,
        "teacher_topk_logprobs": teacher_logprobs,
        "advantages": random(2, 9, 16) - 0.5,
        "old_logprobs": student_logprobs,
        "weight": random(2, 9),
    }


def call(name: str, tensors: Sequence[Tensor | None], *, differentiable: bool, **options: Any) -> list[Tensor]:
    """Return the outputs of a raw operator; of a loss also its gradient by the logits."""
    logits, *others = tensors
    assert logits is not None
    if differentiable:
        logits = logits.clone().requires_grad_()
    outputs = getattr(torch.ops.pruneopd, name)(logits, *others, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = torch.autograd.grad(outputs[0].sum(), logits) if differentiable else ()
    return [tensor.detach() for tensor in [*outputs, *gradients]]


if __name__ == "__main__":
    main()
