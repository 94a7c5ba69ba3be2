"""The losses from hidden states: their time over that of the matrix products alone, and their memory.

python -m bench.linear                         4096 positions, H = 1024, V = 151936, float32; writes the results
python -m bench.linear --loss reverse_kl --rounds 1                                one loss, once: eight minutes
python -m bench.linear --positions 64 --vocabulary 1000 --hidden 32 --no-save      a small one

The yardstick is the products that a reduction needs, made for the same chunks into the same kind of memory, in the same
run: four a position for "sum", five for "none", six where the teacher's logits are needed again. Memory is that of a
process of its own, for full logits as autograd needs them too, at as many positions as this machine has memory for.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import answers, eager, memory, protocol, results
from bench.protocol import Contender
from pruneopd_kernels import linear_opd_loss, reference
from pruneopd_kernels.linear._forward import CHUNK_BYTES

LOSSES = ("topk_policy", "reverse_kl", "topk_forward_kl")
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


def linear(data: Data, loss: str, reduction: str, **options: Any) -> Tensor:
    """One step: the loss and its gradients."""
    data.student.grad = data.student_weight.grad = None
    out = linear_opd_loss(
        data.student, data.student_weight, data.teacher, data.teacher_weight, k=K,
        loss=loss, reduction=reduction, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    out.loss.sum().backward()
    return out.loss.detach()


def full_logits(data: Data, loss: str) -> Tensor:
    """The same as one writes it in PyTorch, with all logits at once."""
    data.student.grad = data.student_weight.grad = None
    student, teacher = data.student @ data.student_weight.T, data.teacher @ data.teacher_weight.T
    with torch.no_grad():
        scored = eager.reliability(student, teacher, K)
    logp, weight = student.log_softmax(-1), scored["weight"]
    if loss == "topk_policy":
        candidates = logp.gather(-1, scored["topk_ids"])
        value = -(scored["rewards"] * (candidates - candidates.detach()).exp()).sum(-1)
    elif loss == "reverse_kl":
        value = weight * (logp.exp() * (logp - teacher.log_softmax(-1))).sum(-1)
    else:
        logq, ids = teacher.log_softmax(-1).topk(K)
        value = weight * (logq.exp() * (logq - logp.gather(-1, ids))).sum(-1)
    value.sum().backward()
    return value.detach()


def products(data: Data, chunk_size: int, *, student: int, teacher: int) -> None:
    """Nothing but the products: so many of each side's logits, then the gradients of hidden states and head."""
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
    """How often each side's logits are computed."""
    if reduction == "sum":
        return {"student": 1, "teacher": 1}
    return {"student": 2, "teacher": 2 if loss == "reverse_kl" else 1}


# --- answers ------------------------------------------------------------------------------------------------------


def complaints(data: Data, loss: str, reduction: str) -> list[str]:
    """What is wrong with the loss and the gradient of a few positions, against the reference over all logits."""
    rows = -(-CHECKED // RESPONSES)
    few = Data(
        data.student.detach()[:, :rows].clone().requires_grad_(), data.teacher[:, :rows],
        data.student_weight.detach().clone().requires_grad_(), data.teacher_weight,
    )  # fmt: skip
    got = {"loss": linear(few, loss, reduction, chunk_size=7).sum(), **_gradients(few)}
    few.student.grad = few.student_weight.grad = None
    student, teacher = few.student @ few.student_weight.T, few.teacher @ few.teacher_weight.T
    scored = reference.reliability(student.detach(), teacher, k=K)
    if loss == "topk_policy":
        value = reference.topk_policy_loss(student, scored.topk_ids, scored.rewards)
    elif loss == "reverse_kl":
        value = reference.reverse_kl(student, teacher, weight=scored.weight)
    else:
        stats = reference.token_stats(student.detach(), teacher, k=K)
        value = reference.topk_forward_kl(student, stats.teacher_topk_ids, stats.teacher_topk_logprobs).loss
        value = value * scored.weight
    value.sum().backward()
    gold = {"loss": value.sum().detach(), **_gradients(few)}
    sizes = {name: tensor.abs().max() for name, tensor in gold.items()}
    got, gold = ({name: x / sizes[name] for name, x in found.items()} for found in (got, gold))
    return answers.complaints(got, gold, answers.PEER_TOLERANCE["float32"])


def _gradients(data: Data) -> dict[str, Tensor]:
    assert data.student.grad is not None
    assert data.student_weight.grad is not None
    return {"gradient of the hidden states": data.student.grad, "gradient of the head": data.student_weight.grad}


# --- memory -------------------------------------------------------------------------------------------------------


def measure_memory(size: Size, loss: str, reduction: str, threads: int) -> int:
    """Bytes beyond inputs, outputs and gradients at the peak of a step, in a process of its own."""
    description = {**asdict(size), "loss": loss, "reduction": reduction, "threads": threads}
    return memory.of_process("bench.linear", description)


def _measure_here(description: dict[str, Any]) -> int:
    torch.set_num_threads(description.pop("threads"))
    loss, reduction = description.pop("loss"), description.pop("reduction")

    def step(data: Data) -> tuple[Data, Tensor]:
        return data, full_logits(data, loss) if reduction == FULL else linear(data, loss, reduction)

    size = Size(**description)
    small = replace(size, positions=4, vocabulary=64)
    grown, (data, out) = memory.growth(lambda: step(Data.of(small)), lambda: Data.of(size), step)
    assert data.student.grad is not None
    assert data.student_weight.grad is not None
    return grown - out.nbytes - data.student.grad.nbytes - data.student_weight.grad.nbytes


def positions_of_full_logits(size: Size) -> int:
    """As many as there is memory for, a half, a quarter, ... of them all."""
    meminfo = Path("/proc/meminfo").read_text()
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    positions = size.positions
    while positions > RESPONSES and positions * size.vocabulary * EAGER_BYTES > available // 2:
        positions //= 2
    return positions


# --- a run --------------------------------------------------------------------------------------------------------

Calls = dict[str, Callable[[], object]]


def calls(data: Data, size: Size, losses: Sequence[str] = LOSSES) -> Calls:
    """What is timed: each loss with each reduction, the products that they need, and a half of it exhausted."""
    found: Calls = {}
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
    """Smaller: what of a chunk lies behind the end of a response is computed for nothing."""
    return max(1, size.chunk_size // 4)


def time_rows(size: Size, timings: Mapping[str, protocol.Timing], losses: Sequence[str] = LOSSES) -> list[results.Row]:
    rows = []
    for loss in losses:
        for reduction in REDUCTIONS:
            bare, timing = timings[str(needed(loss, reduction))], timings[f"{loss} {reduction}"]
            row = _head(size, loss, reduction, size.chunk_size) | _times(timing)
            row |= {"products_ms": _digits(bare.median_s * 1e3)}
            rows.append(row | {"time_over_products": _digits(timing.median_s / bare.median_s)})
    row = _head(size, "topk_policy", "sum", chunk_size_of_skipping(size)) | {"exhausted": 0.5}
    over = timings["skip True"].median_s / timings["skip False"].median_s
    rows.append(row | _times(timings["skip True"]) | {"time_over_not_skipping": _digits(over)})
    return rows


def run(
    size: Size, threads: int, seconds: float, min_rounds: int, losses: Sequence[str] = LOSSES
) -> tuple[list[results.Row], list[str]]:
    """The rows, or what is wrong with the answers. Checking those has warmed up what can be."""
    data = Data.of(size)
    every = [(loss, reduction) for loss in losses for reduction in REDUCTIONS]
    wrong = [f"{' '.join(case)}: {words}" for case in every for words in complaints(data, *case)]
    if wrong:
        return [], wrong
    contenders = [Contender(name, call, max_rounds=1000) for name, call in calls(data, size, losses).items()]
    rows = time_rows(size, protocol.interleave(contenders, seconds=seconds, min_rounds=min_rounds), losses)
    del data, contenders  # what is measured next has processes of its own
    for row in rows:
        if "exhausted" not in row:
            row["extra_bytes"] = measure_memory(size, row["loss"], row["reduction"], threads)
            allowed = 3 * size.chunk_size * size.vocabulary * 4 + ALLOWED_BYTES
            row["extra_over_allowed"] = _digits(row["extra_bytes"] / allowed)
    fitting = replace(size, positions=positions_of_full_logits(size))
    for loss in losses:
        row = _head(fitting, loss, FULL, fitting.positions)
        rows.append(row | {"extra_bytes": measure_memory(fitting, loss, FULL, threads)})
    return rows, []


def _times(timing: protocol.Timing) -> results.Row:
    return {
        "rounds": timing.rounds,
        "median_ms": _digits(timing.median_s * 1e3),
        "min_ms": _digits(timing.min_s * 1e3),
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _head(size: Size, loss: str, reduction: str, chunk_size: int) -> results.Row:
    return {
        "measure": "linear",
        "op": "linear_opd_loss",
        "loss": loss,
        "reduction": reduction,
        "dtype": "float32",
        **asdict(size),
        "chunk_size": chunk_size,
        "threads": torch.get_num_threads(),
        "cpu": results.cpu(),
        **results.versions(),
        "load_average": results.LOAD_AVERAGE,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--loss", action="append", choices=LOSSES, help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="how long all take turns, if that is enough")
    parser.add_argument("--rounds", type=int, default=3, help="rounds at least")
    parser.add_argument("--no-save", dest="save", action="store_false")
    parser.add_argument("--file", type=Path, help="the results to write")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        print(_measure_here(json.loads(options.memory)))
        return 0
    torch.set_num_threads(options.threads)
    size = Size(options.positions, options.hidden, options.vocabulary)
    rows, wrong = run(size, options.threads, options.seconds, options.rounds, options.loss or LOSSES)
    for complaint in wrong:
        print(f"NOT TIMED: {complaint}", file=sys.stderr)
    for row in rows:
        shown = ("loss", "reduction", "positions", "chunk_size", "median_ms", "products_ms", "time_over_products",
                 "time_over_not_skipping", "extra_bytes")  # fmt: skip
        print(", ".join(f"{name} {row[name]}" for name in shown if name in row), flush=True)
    if options.save and rows:
        file = options.file or results.FOLDER / f"{results.file_name('cpu')}.jsonl"
        results.save(rows, file)
        print(f"written to {file}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
