"""Every operator on small tensors of a GPU, against the reference on the CPU, as in `python -m scripts.gpu_small cuda`.

Small enough for compute-sanitizer, and what is most likely to go wrong is there: rows that are not aligned, that end in
the middle of a vector, that are split over blocks; ties, NaN, infinities; masks, packed responses, every dtype.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pruneopd_kernels
from pruneopd_kernels.ops import OPERATORS

Call = tuple[str, str, tuple[Tensor, ...], dict[str, Any]]
FLOATS = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS = {
    torch.float32: FLOATS,
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
}
LOSSES = tuple(name for name, op in OPERATORS.items() if op.saved)


def calls() -> Iterator[Call]:
    """(what, operator, tensors, options), all on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def pair(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        student = torch.randn(shape, generator=generator).mul_(2.5)
        teacher = torch.randn(shape, generator=generator).mul_(0.4).add_(student)
        return student.to(dtype), teacher.to(dtype)

    mask = torch.rand(2, 5, generator=generator) < 0.8
    tokens = torch.randint(1000, (2, 5), generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{dtype}", "reliability", (*pair(2, 5, 1000, dtype=dtype), mask), {"k": 16}
        yield f"{dtype}", "token_stats", (*pair(2, 5, 1000, dtype=dtype), mask), {"k": 16, "token_ids": tokens}
    student, teacher = pair(2, 5, 1001)
    for op in ("reliability", "token_stats"):
        yield "an odd width, so that rows are not aligned", op, (student, teacher), {"k": 64}
        yield "two dtypes", op, (student.float(), teacher), {"k": 7}
        yield "a vocabulary that ends before the row", op, (student, teacher), {"k": 16, "vocab_size": 999}
        yield "full width, one position", op, pair(1, 1, 151936), {"k": 16}
        yield "full width, all candidates", op, pair(1, 2, 151936), {"k": 256}
        yield "equal logits", op, (torch.zeros(1, 2, 40000, dtype=torch.bfloat16),) * 2, {"k": 256}
        broken = [logits.clone() for logits in (student, teacher)]
        broken[0][0, 1, 5] = torch.nan
        broken[1][0, 2, 700] = torch.inf
        broken[0][1, :, 3:] = -torch.inf
        yield "NaN and infinities", op, tuple(broken), {"k": 16}
    packed = torch.tensor([0, 7, 7, 10], dtype=torch.int32)
    flat = [logits.flatten(0, 1) for logits in (student, teacher)]
    yield "packed", "reliability", tuple(flat), {"cu_seqlens": packed, "drift_count": packed[:3]}
    yield "by mass", "reliability", (student, teacher, mask), {"metric": "top_p", "token_ids": tokens}
    ids = torch.rand(2, 3, 700, 40, generator=generator).topk(16).indices
    yield "ids", "reliability_from_topk", (ids[0], ids[1]), {}
    drift = torch.rand(3, 5000, generator=generator) < 0.02
    yield "drift", "reliability_from_drift", (drift, torch.rand(3, 5000, generator=generator) < 0.9), {}


def loss_calls() -> Iterator[Call]:
    """The same of what has a gradient, each followed by its backward pass."""
    generator = torch.Generator().manual_seed(1)

    def others(op: str, student: Tensor, teacher: Tensor, m: int = 16) -> tuple[Tensor, ...]:
        """What an operator requires besides the student's logits."""
        ids = torch.randint(student.shape[-1] - 2, (*student.shape[:-1], m), generator=generator)
        ids[..., m // 2 :] = teacher.float().nan_to_num().topk(m - m // 2).indices  # some twice
        ids[..., -1] = -1
        floats = torch.randn(ids.shape, generator=generator)
        distinct = torch.rand((*student.shape[:-1], student.shape[-1] - 2), generator=generator).topk(m).indices
        known = {"teacher_logits": teacher, "topk_ids": ids, "token_ids": ids, "advantages": floats}
        known |= {"teacher_topk_ids": distinct, "teacher_topk_logprobs": floats.log_softmax(-1)}
        required = [name for name, p in OPERATORS[op].parameters.items() if p.default is inspect.Parameter.empty]
        return tuple(known[name] for name in required[1:])

    mask = torch.rand(2, 5, generator=generator) < 0.8
    for op in LOSSES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for what, width in (("", 1000), (", an odd width", 1001), (", narrow", 33)):
                student, teacher = (torch.randn(2, 5, width, generator=generator).mul_(2).to(dtype) for _ in range(2))
                yield f"{dtype}{what}", op, (student, *others(op, student, teacher), mask), {}
        student, teacher = (torch.randn(2, 5, 1003, generator=generator).mul_(2) for _ in range(2))
        yield "shifted rows", op, (student[..., 1:], *others(op, student[..., 1:], teacher[..., :-1])), {}
        temperature = next(name for name in OPERATORS[op].scalars if name.endswith("temperature"))
        yield "all candidates", op, (student, *others(op, student, teacher, 256)), {temperature: 0.7}
        yield (
            "a vocabulary that ends before the row",
            op,
            (student, *others(op, student, teacher)),
            {"vocab_size": 1001},
        )
        student[0, 1, 5], student[0, 2, 700], student[1, 0, 3:] = torch.nan, torch.inf, -torch.inf
        yield "NaN and infinities", op, (student, *others(op, student, teacher)), {temperature: 2.0}
        student, teacher = (torch.randn(1, 2, 151936, generator=generator).mul_(3).bfloat16() for _ in range(2))
        student[0, 1, 77777] = 40.0
        yield "full width, one of them a peak", op, (student, *others(op, student, teacher)), {}
        if "teacher_logits" in OPERATORS[op].tensors:
            yield "two dtypes", op, (student.float(), teacher), {}


def results(op: str, tensors: list[Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the outputs by name; of a loss also its gradient."""
    function = getattr(pruneopd_kernels, op)
    if op not in LOSSES:
        return function(*tensors, **options)._asdict()  # type: ignore[no-any-return]
    student = tensors[0].detach().requires_grad_()
    result = function(student, *tensors[1:], **options)
    outputs = {"loss": result} if isinstance(result, Tensor) else result._asdict()
    flowing = [outputs[name] for name in OPERATORS[op].differentiable]
    upstream = [torch.linspace(-1, 2, x.numel(), device=student.device).view_as(x) for x in flowing]
    (gradient,) = torch.autograd.grad(flowing, student, upstream)
    return {name: tensor.detach() for name, tensor in outputs.items()} | {"gradient": gradient}


def differences(call: Call, impl: str, device: str) -> str | None:
    """What is wrong with the outputs, or None."""
    _, op, tensors, options = call
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    got = results(op, [tensor.to(device) for tensor in tensors], {**moved, "impl": impl})
    expected = results(op, list(tensors), {**options, "impl": "reference"})
    for name, right in expected.items():
        try:
            exact = {} if right.is_floating_point() else {"rtol": 0, "atol": 0}
            floats = GRADIENTS[right.dtype] if name == "gradient" else FLOATS
            torch.testing.assert_close(got[name].cpu(), right, equal_nan=True, **(exact or floats))
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())}"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each call that is wrong; 1 if there is any."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_small", description=__doc__)
    parser.add_argument("impl", nargs="+")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    wrong = 0
    for impl in options.impl:
        done = 0
        for call in (*calls(), *loss_calls()):
            what = f"{impl} {call[1]}, {call[0]}"
            try:
                why = differences(call, impl, options.device)
            except Exception:
                why = traceback.format_exc()
            if why is not None:
                print(f"WRONG {what}: {why}", flush=True)
                wrong += 1
            done += 1
        print(f"{impl}: {done} calls", flush=True)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
