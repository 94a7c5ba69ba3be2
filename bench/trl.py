"""The losses of TRL's trainers beside TRL's own: time and peak memory of one forward and backward pass.

python -m bench.trl                                                4096 positions, H = 2048, V = 151936
python -m bench.trl --positions 64 --vocabulary 1000 --hidden 32   a small one

On a GPU operands are bfloat16, on a CPU float32. Where TRL is not installed there is nothing to compare with, and the
run says so. A loss is first held to TRL's, without pruning; what is timed has the paper's hyperparameters.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu, protocol, results
from bench.protocol import Contender
from pruneopd_kernels import PruneConfig

RESPONSES = 4
STOCK = "trl"
LOSSES = ("reverse_kl", "topk_policy", "divergence")
EQUAL = ("reverse_kl", "divergence")  # to TRL's without pruning; topk_policy is with k = V alone
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Size:
    positions: int = 4096
    hidden: int = 2048
    vocabulary: int = 151936


Inputs = dict[str, Tensor]


def inputs(size: Size, device: str) -> Inputs:
    """Hidden states and heads as TRL's loss takes them; the teacher's resemble the student's."""
    random = torch.Generator(device).manual_seed(0)
    shape = (RESPONSES, size.positions // RESPONSES, size.hidden)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    student, weight = draw(*shape), draw(size.vocabulary, size.hidden) / size.hidden**0.5
    return {
        "student_hidden_states": student.to(dtype).requires_grad_(),
        "teacher_hidden_states": (student + 0.3 * draw(*shape)).to(dtype),
        "student_lm_head_weight": weight.to(dtype).requires_grad_(),
        "teacher_lm_head_weight": weight.to(dtype),
        "completion_mask": torch.ones(shape[:2], device=device),
    }


def step(given: Inputs, loss: str, prune: PruneConfig) -> Tensor:
    """The loss and its gradients."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from pruneopd_kernels.integrations.trl.losses import PrunedLoss

    given["student_hidden_states"].grad = given["student_lm_head_weight"].grad = None
    mask = given["completion_mask"]
    form: Callable[..., Any] = _chunked_divergence_loss
    if loss != STOCK:
        form = PrunedLoss(prune, loss, torch.zeros_like(mask, dtype=torch.int64))  # type: ignore[arg-type]
    value: Tensor = form(**given, beta=1.0, num_items_in_batch=mask.numel())[0]
    value.backward()
    return value.detach()


def complaints(given: Inputs) -> list[str]:
    """What differs from TRL's loss and gradients without pruning."""
    unpruned = PruneConfig(w_drop=0.0, w_base=0.0)
    found = {loss: _answers(given, loss, unpruned) for loss in (STOCK, *EQUAL)}
    wrong = []
    for loss in EQUAL:
        for name, gold in found[STOCK].items():
            error = float(abs(found[loss][name] - gold) / gold)
            if not error <= TOLERANCE[given["student_hidden_states"].dtype]:
                wrong.append(f"{loss}: {name} is {error:.1e} from TRL's")
    return wrong


def _answers(given: Inputs, loss: str, prune: PruneConfig) -> dict[str, Tensor]:
    value = step(given, loss, prune)
    hidden, weight = given["student_hidden_states"].grad, given["student_lm_head_weight"].grad
    assert hidden is not None
    assert weight is not None
    norms = {"the hidden states' gradient": hidden.float().norm(), "the head's gradient": weight.float().norm()}
    return {"the loss": value, **norms}


def extra_bytes(given: Inputs, loss: str) -> int:
    """Memory of torch's allocator at the peak of a step, beyond inputs and gradients."""
    hidden, weight = given["student_hidden_states"], given["student_lm_head_weight"]
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(given, loss, PruneConfig())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes


def run(size: Size, device: str, seconds: float, min_rounds: int) -> tuple[list[results.Row], list[str]]:
    """The rows, or what is wrong with the answers."""
    given = inputs(size, device)
    if wrong := complaints(given):
        return [], wrong
    on_gpu = device == "cuda"
    something = torch.ones(gpu.READ_BYTES // 4, device=device) if on_gpu else torch.ones(1)
    contenders = [
        Contender(loss, functools.partial(step, given, loss, PruneConfig()), functools.partial(torch.amax, something))
        for loss in (STOCK, *LOSSES)
    ]
    clock = gpu.clock if on_gpu else protocol.processor_clock
    timings = protocol.interleave(contenders, seconds=seconds, min_rounds=min_rounds, clock=clock)
    del contenders, something
    rows = []
    for loss, timing in timings.items():
        row = _head(size, device, loss, given["student_hidden_states"].dtype)
        row |= {"rounds": timing.rounds, "median_ms": _digits(timing.median_s * 1e3)}
        row |= {"times_faster_than_trl": _digits(timings[STOCK].median_s / timing.median_s)}
        rows.append(row | ({"extra_bytes": extra_bytes(given, loss)} if on_gpu else {}))
    return rows, []


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _head(size: Size, device: str, loss: str, dtype: torch.dtype) -> results.Row:
    on_cpu = {"cpu": results.cpu(), "threads": torch.get_num_threads()}
    return {
        "measure": "trl",
        "op": "distillation loss",
        "loss": loss,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(size),
        **({"gpu": results.gpu(device)} if device == "cuda" else on_cpu),
        "trl": results._version("trl"),
        **results.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trl", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=5, help="how long all take turns, if that is enough")
    parser.add_argument("--rounds", type=int, default=3, help="rounds at least")
    parser.add_argument("--file", type=Path, help="where to write the rows, one line each")
    options = parser.parse_args(arguments)
    if find_spec("trl") is None:
        print("bench.trl: TRL is not installed here, so its losses were not measured")
        return 0
    size = Size(options.positions, options.hidden, options.vocabulary)
    rows, wrong = run(size, options.device, options.seconds, options.rounds)
    for complaint in wrong:
        print(f"NOT TIMED: {complaint}", file=sys.stderr)
    for row in rows:
        shown = ("loss", "dtype", "positions", "median_ms", "times_faster_than_trl", "extra_bytes")
        print(", ".join(f"{name} {row[name]}" for name in shown if name in row), flush=True)
    if options.file and rows:
        results.save(rows, options.file)
        print(f"written to {options.file}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
