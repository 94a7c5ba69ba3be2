"""The losses from hidden states: their time over that of the matrix products alone, and their memory.

python -m bench linear                         4096 positions, H = 1024, V = 151936, float32; writes the results
python -m bench linear --loss reverse_kl --rounds 1                                one loss, once: eight minutes
python -m bench linear --positions 64 --vocabulary 1000 --hidden 32 --no-save      a small one

The yardstick is the products that a reduction needs, made for the same chunks into the same kind of memory, in the same
run: four a position for "sum", five for "none", six if the teacher's logits are needed again. Memory is that of a
process of its own, for full logits as autograd needs them too, at as many positions as this machine has memory for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import answers, memory, timing
from bench.measure.implementations import operator
from bench.measure.timing import Contender, Timing
from bench.operators import LINEAR_LOSSES, OPERATORS
from bench.report import rows as results
from bench.studies.command import Options, Study
from pruneopd_kernels import linear_opd_loss
from pruneopd_kernels.linear._chunks import CHUNK_BYTES

LOSSES = tuple(LINEAR_LOSSES)
REDUCTIONS = ("none", "sum")
FULL = "full logits"  # in place of a reduction: the peer
RESPONSES = 2
K = 16
ALLOWED_BYTES = 2**26  # beyond three chunks of logits
CHECKED = 16  # positions whose answer is compared with the reference
EAGER_BYTES = 40  # an element of the logits, that autograd over all of them may need


@dataclass(frozen=True)
class Size:
    positions: int = 4096
    hidden: int = 1024
    vocabulary: int = 151936

    @property
    def chunk_size(self) -> int:
        return max(1, CHUNK_BYTES // (4 * self.vocabulary))


@dataclass(frozen=True)
class Data:
    """Hidden states of long responses that drift everywhere, and a head for both models."""

    student: Tensor
    teacher: Tensor
    student_weight: Tensor
    teacher_weight: Tensor

    @staticmethod
    def of(size: Size) -> Data:
        random = torch.Generator().manual_seed(0)
        shape = (RESPONSES, size.positions // RESPONSES, size.hidden)
        student, teacher = (torch.randn(shape, generator=random) for _ in range(2))
        heads = (torch.randn(size.vocabulary, size.hidden, generator=random) / 16 for _ in range(2))
        return Data(student.requires_grad_(), teacher, next(heads).requires_grad_(), next(heads))

    def forget_gradients(self) -> None:
        self.student.grad = self.student_weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.student.grad is not None
        assert self.student_weight.grad is not None
        return self.student.grad, self.student_weight.grad


def linear(data: Data, loss: str, reduction: str, **options: Any) -> Tensor:
    """Take one step: the loss and its gradients."""
    data.forget_gradients()
    out = linear_opd_loss(
        data.student, data.student_weight, data.teacher, data.teacher_weight, k=K,
        loss=loss, reduction=reduction, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    out.loss.sum().backward()
    return out.loss.detach()


def eager(name: str) -> Callable[..., Any]:
    return OPERATORS[name].eager


def full_logits(data: Data, loss: str, function_of: Callable[[str], Callable[..., Any]] = eager) -> Tensor:
    """Take the same step as one writes it in PyTorch, with all logits at once; or by the functions of the reference."""
    data.forget_gradients()
    student, teacher = data.student @ data.student_weight.T, data.teacher @ data.teacher_weight.T
    name = LINEAR_LOSSES[loss]
    with torch.no_grad():
        scored = answers.fields(function_of("reliability")(student, teacher, k=K))
        known = {"topk_ids": scored["topk_ids"], "advantages": scored["rewards"], "weight": scored["weight"]}
        if "teacher_topk_ids" in OPERATORS[name].given:
            logprobs, ids = teacher.log_softmax(-1).topk(K)
            known |= {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}
    logits = [student, teacher][: len(OPERATORS[name].reads)]
    given = {parameter: known[parameter] for parameter in OPERATORS[name].given}
    value: Tensor = answers.fields(function_of(name)(*logits, **given))["loss"]
    if not {"advantages", "weight"} & given.keys():
        value = value * scored["weight"]
    value.sum().backward()
    return value.detach()


def products(data: Data, chunk_size: int, *, student: int, teacher: int) -> None:
    """Make nothing but the products: so many of each side's logits, then the gradients of hidden states and head."""
    width, hidden = data.student_weight.shape
    total, gradient = torch.zeros(width, hidden), torch.empty_like(data.student).flatten(0, 1)
    logits = torch.empty(min(chunk_size, len(gradient)), width)
    states = {"student": data.student.detach().flatten(0, 1), "teacher": data.teacher.flatten(0, 1)}
    weights = {"student": data.student_weight.detach(), "teacher": data.teacher_weight}
    for start in range(0, len(gradient), chunk_size):
        rows = slice(start, start + chunk_size)
        chunk = {side: hidden[rows] for side, hidden in states.items()}
        out = logits[: len(chunk["student"])]
        for side, times in (("teacher", teacher), ("student", student)):
            for _ in range(times):
                torch.mm(chunk[side], weights[side].t(), out=out)
        torch.mm(out, weights["student"], out=gradient[rows])
        total.addmm_(out.t(), chunk["student"])


def needed(loss: str, reduction: str) -> dict[str, int]:
    """Return how often each side's logits are computed."""
    if reduction == "sum":
        return {"student": 1, "teacher": 1}
    return {"student": 2, "teacher": len(OPERATORS[LINEAR_LOSSES[loss]].reads)}


def complaints(data: Data, loss: str, reduction: str) -> list[str]:
    """Return what is wrong with the loss and the gradient of a few positions, against the reference on all logits."""
    rows = -(-CHECKED // RESPONSES)
    few = Data(
        data.student.detach()[:, :rows].clone().requires_grad_(), data.teacher[:, :rows],
        data.student_weight.detach().clone().requires_grad_(), data.teacher_weight,
    )  # fmt: skip
    names = ("loss", "gradient of the hidden states", "gradient of the head")
    got = [linear(few, loss, reduction, chunk_size=7).sum(), *few.gradients()]
    gold = [full_logits(few, loss, functools.partial(operator, impl="reference")).sum(), *few.gradients()]
    sizes = [tensor.abs().max() for tensor in gold]
    one, other = (dict(zip(names, map(torch.div, side, sizes), strict=True)) for side in (got, gold))
    return answers.complaints(one, other, answers.PEER_TOLERANCE["float32"])


# --- memory -------------------------------------------------------------------------------------------------------


def measure_memory(size: Size, loss: str, reduction: str, threads: int) -> int:
    """Return bytes beyond inputs, outputs and gradients at the peak of a step, in a process of its own."""
    description = {**asdict(size), "loss": loss, "reduction": reduction, "threads": threads}
    return memory.of_process("bench.studies.linear", description)


def _measure_here(description: dict[str, Any]) -> int:
    loss, reduction = description.pop("loss"), description.pop("reduction")
    size = Size(**description)
    data, small = Data.of(size), Data.of(replace(size, positions=4, vocabulary=64))

    def step(data: Data) -> Tensor:
        return full_logits(data, loss) if reduction == FULL else linear(data, loss, reduction)

    grown, out = memory.growth(lambda: step(small), lambda: step(data))
    return grown - sum(tensor.nbytes for tensor in (out, *data.gradients()))


def positions_of_full_logits(size: Size) -> int:
    """Return as many as there is memory for: a half, a quarter, ... of them all."""
    meminfo = Path("/proc/meminfo").read_text()
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    positions = size.positions
    while positions > RESPONSES and positions * size.vocabulary * EAGER_BYTES > available // 2:
        positions //= 2
    return positions


# --- a run --------------------------------------------------------------------------------------------------------


def calls(data: Data, size: Size, losses: Sequence[str] = LOSSES) -> dict[str, Callable[[], object]]:
    """Return what is timed: each loss with each reduction, the products that they need, and a half of it exhausted."""
    found: dict[str, Callable[[], object]] = {}
    for loss in losses:
        for reduction in REDUCTIONS:
            counts = needed(loss, reduction)
            found[f"{loss} {reduction}"] = functools.partial(linear, data, loss, reduction)
            found[str(counts)] = functools.partial(products, data, size.chunk_size, **counts)
    halfway = {"w_base": 0.0, "w_drop": 2 * RESPONSES / size.positions, "chunk_size": chunk_size_of_skipping(size)}
    for skip in (False, True):
        found[f"skip {skip}"] = functools.partial(linear, data, "topk_policy", "sum", skip_exhausted=skip, **halfway)
    return found


def chunk_size_of_skipping(size: Size) -> int:
    """Return a smaller one: what of a chunk lies behind the end of a response is computed for nothing."""
    return max(1, size.chunk_size // 4)


def time_rows(size: Size, timings: Mapping[str, Timing], losses: Sequence[str] = LOSSES) -> list[results.Row]:
    rows = []
    for loss in losses:
        for reduction in REDUCTIONS:
            bare, took = timings[str(needed(loss, reduction))], timings[f"{loss} {reduction}"]
            row = _head(size, loss, reduction, size.chunk_size) | results.times(took)
            row |= {"products_ms": results.digits(bare.median_s * 1e3)}
            rows.append(row | {"time_over_products": results.digits(took.median_s / bare.median_s)})
    row = _head(size, "topk_policy", "sum", chunk_size_of_skipping(size)) | {"exhausted": 0.5}
    over = timings["skip True"].median_s / timings["skip False"].median_s
    rows.append(row | results.times(timings["skip True"]) | {"time_over_not_skipping": results.digits(over)})
    return rows


def run(size: Size, options: Options) -> tuple[list[results.Row], list[str]]:
    """Return the rows, or what is wrong with the answers. Checking those has warmed up what can be."""
    losses = options.loss or LOSSES
    data = Data.of(size)
    every = [(loss, reduction) for loss in losses for reduction in REDUCTIONS]
    wrong = [f"{' '.join(case)}: {words}" for case in every for words in complaints(data, *case)]
    if wrong:
        return [], wrong
    contenders = [Contender(name, call, max_rounds=1000) for name, call in calls(data, size, losses).items()]
    timings = timing.interleave(contenders, seconds=options.seconds, min_rounds=options.rounds)
    rows = time_rows(size, timings, losses)
    del data, contenders  # what is measured next has processes of its own
    for row in rows:
        if "exhausted" not in row:
            row["extra_bytes"] = measure_memory(size, row["loss"], row["reduction"], options.threads)
            allowed = 3 * size.chunk_size * size.vocabulary * 4 + ALLOWED_BYTES
            row["extra_over_allowed"] = results.digits(row["extra_bytes"] / allowed)
    fitting = replace(size, positions=positions_of_full_logits(size))
    for loss in losses:
        row = _head(fitting, loss, FULL, fitting.positions)
        rows.append(row | {"extra_bytes": measure_memory(fitting, loss, FULL, options.threads)})
    return rows, []


def _head(size: Size, loss: str, reduction: str, chunk_size: int) -> results.Row:
    fields = {"op": "linear_opd_loss", "loss": loss, "reduction": reduction, "dtype": "float32"}
    return results.head("linear", **fields, **asdict(size), chunk_size=chunk_size)


SHOWN = ("loss", "reduction", "positions", "chunk_size", "median_ms", "products_ms", "time_over_products",
         "time_over_not_skipping", "extra_bytes")  # fmt: skip
STUDY = Study("linear", __doc__, Size(), run, SHOWN, seconds=60, rounds=3, memory=_measure_here)


def main(arguments: Sequence[str] | None = None) -> int:
    return STUDY.main(arguments, loss={"action": "append", "choices": LOSSES, "help": "default: all"})


if __name__ == "__main__":
    raise SystemExit(main())
