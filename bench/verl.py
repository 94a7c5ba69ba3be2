"""verl's `compute_forward_kl_topk`, and `topk_forward_kl` in its place: time and memory of both passes, on the CPU.

python -m bench.verl                                      256 positions, V = 151936, k = 16; writes the results
python -m bench.verl --positions 32 --vocabulary 1000 --no-save                                       a small one

Both are called as verl's engine calls them. "full" is verl's way of old, a log-softmax of all logits; "chunked" the one
with `use_chunked_topk`, in four chunks: verl's have 4096 positions of some ten thousand. Memory is that of a process of
its own, beyond the logits and their gradient. Where verl is not installed there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import memory, protocol, results
from bench.protocol import Contender

K = 16
CHUNKS = 4
WAYS = ("verl full", "verl chunked", "pruneopd")
DTYPES = ("float32", "bfloat16")
TOLERANCE = dict.fromkeys(DTYPES, 1e-5)
GRADIENT = {"float32": 1e-5, "bfloat16": 2**-8}  # which is rounded to the logits' dtype


@dataclass(frozen=True)
class Size:
    positions: int = 256
    vocabulary: int = 151936


@dataclass(frozen=True)
class Data:
    """The logits of a packed micro-batch, and what a teacher's server sent for it."""

    logits: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    upstream: Tensor

    @staticmethod
    def of(size: Size, dtype: str) -> Data:
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(1, size.positions, size.vocabulary, generator=random) * 3
        upstream = torch.rand(logits.shape[:2], generator=random)
        noise = torch.empty(size.vocabulary)
        tops = [(row + noise.normal_(generator=random)).log_softmax(-1).topk(K) for row in logits[0]]
        ids, logprobs = (torch.stack([getattr(top, part) for top in tops]) for part in ("indices", "values"))
        halves = size.positions // 2, size.positions - size.positions // 2
        ids, logprobs = (torch.nested.as_nested_tensor(list(x.split(halves)), layout=torch.jagged)
                         for x in (ids, logprobs))  # fmt: skip
        return Data(logits.to(getattr(torch, dtype)).requires_grad_(), ids, logprobs, upstream)


def function_of(way: str, size: Size) -> Callable[[Data], dict[str, Tensor]]:
    """Both passes by verl's function or by the one that `patch_verl` puts there."""
    from verl.trainer.distillation.fsdp import losses
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    from pruneopd_kernels.integrations.verl import patch_verl

    forward = losses.compute_forward_kl_topk
    if way == "pruneopd":
        patch_verl()
        forward, losses.compute_forward_kl_topk = losses.compute_forward_kl_topk, forward
    config = DistillationConfig(
        distillation_loss=DistillationLossConfig(
            loss_mode="forward_kl_topk", topk=K, use_task_rewards=False, use_policy_gradient=False,
            use_chunked_topk=way == "verl chunked", chunked_topk_chunk_size=-(-size.positions // CHUNKS),
        )
    )  # fmt: skip

    def both(data: Data) -> dict[str, Tensor]:
        outputs = forward(data.logits, data.teacher_logprobs, data.teacher_ids, config, "thd")
        (gradient,) = torch.autograd.grad(outputs["distillation_losses"], data.logits, data.upstream)
        return {**outputs, "gradient": gradient}

    return both


def complaints(data: Data, size: Size, dtype: str) -> list[str]:
    """What differs from verl's losses, masses and gradient of the same logits in float64."""
    exact = replace(data, logits=data.logits.detach().double().requires_grad_())
    gold, found = function_of("verl full", size)(exact), function_of("pruneopd", size)(data)
    wrong = []
    for name in ("distillation_losses", "student_mass", "teacher_mass", "gradient"):
        error = float((found[name].detach() - gold[name].detach()).abs().max())
        if not error <= (GRADIENT if name == "gradient" else TOLERANCE)[dtype]:
            wrong.append(f"{dtype}: {name} is {error:.1e} from that of verl in float64")
    return wrong


def measure_memory(size: Size, dtype: str, way: str, threads: int) -> int:
    """Bytes beyond inputs and gradient at the peak of both passes, in a process of its own."""
    description = {**asdict(size), "dtype": dtype, "way": way, "threads": threads}
    return memory.of_process("bench.verl", description)


def _measure_here(description: dict[str, Any]) -> int:
    torch.set_num_threads(description.pop("threads"))
    dtype, way = description.pop("dtype"), description.pop("way")
    size = Size(**description)
    run = function_of(way, size)
    grown, outputs = memory.growth(lambda: run(Data.of(Size(4, 64), dtype)), lambda: Data.of(size, dtype), run)
    return grown - sum(tensor.nbytes for tensor in outputs.values())


def run(size: Size, threads: int, seconds: float, min_rounds: int) -> tuple[list[results.Row], list[str]]:
    """The rows, or what is wrong with the answers."""
    rows: list[results.Row] = []
    wrong: list[str] = []
    for dtype in DTYPES:
        data = Data.of(size, dtype)
        if found := complaints(data, size, dtype):
            wrong += found
            continue
        read = functools.partial(torch.amax, data.logits.detach(), -1)
        contenders = [Contender(way, functools.partial(function_of(way, size), data), read) for way in WAYS]
        timings = protocol.interleave(contenders, seconds=seconds, min_rounds=min_rounds)
        del data, contenders, read  # what is measured next has processes of its own
        for way, timing in timings.items():
            row = _head(size, dtype, way) | {
                "rounds": timing.rounds,
                "median_ms": _digits(timing.median_s * 1e3),
                "min_ms": _digits(timing.min_s * 1e3),
                "times_faster_than_verl": _digits(timings[WAYS[0]].median_s / timing.median_s),
            }
            rows.append(row | {"extra_bytes": measure_memory(size, dtype, way, threads)})
    return rows, wrong


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _head(size: Size, dtype: str, way: str) -> results.Row:
    return {
        "measure": "verl",
        "op": "topk_forward_kl",
        "dtype": dtype,
        "impl": way,
        "k": K,
        "passes": "both",
        **asdict(size),
        "threads": torch.get_num_threads(),
        "cpu": results.cpu(),
        "verl": results._version("verl"),
        **results.versions(),
        "load_average": results.LOAD_AVERAGE,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verl", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="how long all take turns, if that is enough")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at least")
    parser.add_argument("--no-save", dest="save", action="store_false")
    parser.add_argument("--file", type=Path, help="the results to write")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        print(_measure_here(json.loads(options.memory)))
        return 0
    if find_spec("verl") is None:
        print("bench.verl: verl is not installed here, so its loss was not measured")
        return 0
    torch.set_num_threads(options.threads)
    size = Size(options.positions, options.vocabulary)
    rows, wrong = run(size, options.threads, options.seconds, options.rounds)
    for complaint in wrong:
        print(f"NOT TIMED: {complaint}", file=sys.stderr)
    for row in rows:
        shown = ("dtype", "impl", "median_ms", "times_faster_than_verl", "extra_bytes")
        print(", ".join(f"{name} {row[name]}" for name in shown), flush=True)
    if options.save and rows and not wrong:
        file = options.file or results.FOLDER / f"{results.file_name('cpu')}.jsonl"
        results.save(rows, file)
        print(f"written to {file}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
