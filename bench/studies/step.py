"""A training step from logits: scores, weights, loss and gradient; `opd_loss` against what one writes without it.

python -m bench step                                    64 positions, V = 151936, k = 16; writes the results
python -m bench step --positions 8 --vocabulary 1000 --no-save                                           a small one

"eager" and "compiled" are the same step in PyTorch, the second by `torch.compile`; "two calls" is `reliability`
followed by the loss. The yardstick "read and write" reads and writes what the step cannot do without: the student's
logits twice, the teacher's once (twice for reverse_kl), the gradient once. Memory is that of a process of its own,
beyond logits and outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import operators
from bench.measure import answers, cases, memory, timing
from bench.measure.implementations import read_logits
from bench.measure.timing import Contender
from bench.report import rows as results
from bench.studies.command import Options, Study

K = 16
WAYS = ("eager", "compiled", "two calls", "opd_loss", "read and write")
LOSSES = ("topk_policy", "reverse_kl")
DTYPES = ("float32", "bfloat16")
Step = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Size:
    positions: int = 64
    vocabulary: int = 151936


def logits(size: Size, dtype: str) -> tuple[Tensor, Tensor]:
    """Return student and teacher, `[4, positions / 4, V]`."""
    random, shape = torch.Generator().manual_seed(0), (4, size.positions // 4, size.vocabulary)
    student = torch.randn(shape, generator=random) * 2.5
    teacher = student + torch.randn(shape, generator=random) * 0.4
    return student.to(getattr(torch, dtype)).requires_grad_(), teacher.to(getattr(torch, dtype))


def in_pytorch(student: Tensor, teacher: Tensor, loss: str) -> dict[str, Tensor]:
    """Compute scores and loss as one writes them without this library."""
    with torch.no_grad():
        scores = operators.reliability(student, teacher, K)
    if loss == "reverse_kl":
        return scores | operators.reverse_kl(student, teacher, scores["weight"])
    return scores | operators.topk_policy_loss(student, scores["topk_ids"], scores["rewards"])


def two_calls(student: Tensor, teacher: Tensor, loss: str) -> dict[str, Tensor]:
    import pruneopd_kernels

    scores = pruneopd_kernels.reliability(student, teacher, k=K)
    if loss == "reverse_kl":
        value = pruneopd_kernels.reverse_kl(student, teacher, weight=scores.weight)
    else:
        value = pruneopd_kernels.topk_policy_loss(student, scores.topk_ids, scores.rewards)
    return scores._asdict() | {"loss": value}


def fused(student: Tensor, teacher: Tensor, loss: str) -> dict[str, Tensor]:
    import pruneopd_kernels

    return pruneopd_kernels.opd_loss(student, teacher, k=K, loss=loss)._asdict()  # type: ignore[arg-type]


def step_of(way: str, loss: str) -> Step:
    """Return the whole step: outputs, and the gradient of the sum of the losses."""
    if way == "read and write":
        return functools.partial(_read_and_write, again=loss == "reverse_kl")
    forward: Callable[..., dict[str, Tensor]] = {"two calls": two_calls, "opd_loss": fused}.get(way, in_pytorch)
    if way == "compiled":
        forward = cases.compiled(forward)  # type: ignore[assignment]

    def step(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        outputs = forward(student, teacher, loss)
        (gradient,) = torch.autograd.grad(outputs["loss"].sum(), student)
        return outputs | {"gradient": gradient}

    return step


def _read_and_write(student: Tensor, teacher: Tensor, again: bool) -> dict[str, Tensor]:
    student = student.detach()
    maxima = [*read_logits(student, teacher), *(read_logits(teacher) if again else ())]
    return {"gradient": student.clone(), **{f"maximum_{i}": x for i, x in enumerate(maxima)}}


def complaints(student: Tensor, teacher: Tensor, loss: str, dtype: str) -> list[str]:
    """Return what differs from the reference, for the first response."""
    import pruneopd_kernels

    first = student.detach()[:1].requires_grad_()
    expected = pruneopd_kernels.opd_loss(first, teacher[:1], k=K, loss=loss, impl="reference")  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(expected.loss.sum(), first)
    gold = {"loss": expected.loss.detach(), "gradient": gradient}
    wrong = []
    for way in WAYS[:-1]:
        found = {name: x.detach() for name, x in step_of(way, loss)(first, teacher[:1]).items()}
        # PyTorch's topk breaks ties as it likes, and in half precision there are many.
        precision = "native" if dtype != "float32" and way in WAYS[:2] else "float32"
        differs = answers.complaints(found, gold, answers.PEER_TOLERANCE[precision])
        wrong += [f"{loss}, {dtype}, {way}: {words}" for words in differs]
    return wrong


def _measure_here(description: dict[str, Any]) -> int:
    dtype, way, loss = (description.pop(name) for name in ("dtype", "way", "loss"))
    size, step = Size(**description), step_of(way, loss)
    large, small = logits(size, dtype), logits(Size(8, 64), dtype)
    grown, outputs = memory.growth(lambda: step(*small), lambda: step(*large))
    return grown - sum(tensor.nbytes for tensor in outputs.values())


def run(size: Size, options: Options) -> tuple[list[results.Row], list[str]]:
    """Return the rows, or what is wrong with the answers."""
    rows: list[results.Row] = []
    wrong: list[str] = []
    for dtype in DTYPES:
        pair = logits(size, dtype)
        for loss in LOSSES:
            if found := complaints(*pair, loss, dtype):
                wrong += found
                continue
            read = functools.partial(read_logits, pair[0].detach(), pair[1])
            contenders = [Contender(way, functools.partial(step_of(way, loss), *pair), read) for way in WAYS]
            timings = timing.interleave(contenders, seconds=options.seconds, min_rounds=options.rounds)
            for way, took in timings.items():
                row = results.head("step", op="step", loss=loss, dtype=dtype, impl=way, k=K, **asdict(size))
                row |= results.times(took)
                for name, other in (("times_faster_than_eager", WAYS[0]), ("times_faster_than_compiled", WAYS[1])):
                    row[name] = results.digits(timings[other].median_s / took.median_s)
                row["time_over_read_and_write"] = results.digits(took.median_s / timings[WAYS[-1]].median_s)
                description = {**asdict(size), "dtype": dtype, "way": way, "loss": loss, "threads": options.threads}
                rows.append(row | {"extra_bytes": memory.of_process("bench.studies.step", description)})
    return rows, wrong


SHOWN = ("loss", "dtype", "impl", "median_ms", "times_faster_than_eager", "times_faster_than_compiled",
         "time_over_read_and_write", "extra_bytes")  # fmt: skip
STUDY = Study("step", __doc__, Size(), run, SHOWN, seconds=20, rounds=5, memory=_measure_here)


def main(arguments: Sequence[str] | None = None) -> int:
    return STUDY.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
