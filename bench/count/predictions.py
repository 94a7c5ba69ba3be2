"""What the GPU kernels should take, from bytes and from their machine code, so that a measurement can contradict it.

python -m bench predict pruneopd_kernels/_cuda.so        writes bench/results/predictions.jsonl
python -m bench predict FILE.so CUBIN...                 with Triton's kernels, from the cubins in its cache

Many positions. A multiprocessor holds some blocks, each with one position at a time. A position needs its bytes, which
come at a 132nd of the device's bandwidth; the issue slots of its row loop (counted in the SASS) or the time of its
exponentials, whichever is longer, and the issue slots of its selection (estimated below); and it waits for what is
latency alone. If blocks never got into each other's way, the busiest of these would be busy all the time: that is the
upper end of the prediction. The lower end is the mean value analysis of two queues and a delay, where every service is
as irregular as can be. Between them lies what is predicted. At the end of a launch the last positions end one by one.

Few positions. Everything is latency: the phases of one block follow each other.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.count import machine_code as sass
from bench.measure import inputs
from bench.measure.cases import Case, counted_bytes
from bench.operators import LOGIT_OPS, LOSSES, OPERATORS
from bench.report import rows as results


@dataclass(frozen=True)
class Machine:
    """The constants that a prediction rests on; leads from data sheets, but for the copy, which was seen."""

    name: str = "NVIDIA H200"
    arch: str = "sm_90"
    multiprocessors: int = 132
    registers: int = 65536  # of a multiprocessor
    copy_gb_s: float = 4300  # bytes read and written
    ghz: float = 1.755  # under load; 1.98 at most
    issue_slots: int = 4  # a cycle and multiprocessor
    exponentials: int = 16  # the same
    node_us: float = 1.2  # from one node of a graph to the next
    copy_node_us: float = 2.5  # a copy of next to nothing
    load_us: float = 0.8  # of device memory

    def us(self, cycles: float) -> float:
        return cycles / self.ghz / 1e3


H200 = Machine()
WARPS = {"cuda": 8, "triton": 4}  # of a block, a program


@dataclass(frozen=True)
class Work:
    """What one position takes."""

    memory_us: float  # alone on its multiprocessor's share of the bandwidth
    compute_us: float  # if its multiprocessor did nothing else
    wait_us: float  # latency that other blocks can hide
    blocks: int  # on a multiprocessor


# Besides the row loop, by what is written in csrc/cuda/selection.cuh and row_pair.cuh. `found`: elements that reach the
# k-th largest tile maximum, of 151936 normal ones. Cycles are those of the slowest warp.
TILES = 594
FOUND = {16: 17, 64: 75, 256: 400}
STEPS_OF_BISECTION = 8
PER_TILE = 130  # instructions of one warp for a tile that is looked at again
TRITON_SELECTION = {16: 10_000, 64: 25_000, 256: 70_000}  # instructions of all warps, as counted in trial kernels


def other_instructions(case: Case) -> float:
    """Return how many there are besides the row loop, of all warps together."""
    op = OPERATORS[case.op]
    if case.passes == "backward":
        return 2000 if len(op.reads) == 2 else 4000  # the state; the candidates too
    if op.selections == 1:
        return selection_instructions(case.impl, case.k) / 2 + 1000
    return selection_instructions(case.impl, case.k) if op.selections else 4000


def other_cycles(case: Case) -> float:
    """Return what a block waits for besides: before its row and after it.

    The selection of a single row has twice the warps, but its scans do not.
    """
    op = OPERATORS[case.op]
    if case.passes == "backward":
        return 2500 if len(op.reads) == 2 else 5000
    return selection_cycles(case.impl, case.k) if op.selections else 4500


def selection_instructions(impl: str, k: int) -> float:
    """Of all warps together, for both rows."""
    if impl == "triton":
        return TRITON_SELECTION[k]
    scans = 2 * math.ceil(TILES / 32) * (6 * (2 + STEPS_OF_BISECTION) + 25)
    ranks = 2 * 4 * math.ceil(FOUND[k] / 128) * FOUND[k] * 4
    overlap = 8 * math.ceil(k / 32) * k / 8 * 4
    outputs = math.ceil(k / 32) * 600
    return scans + 2 * k * PER_TILE + ranks + overlap + outputs + 1500


def selection_cycles(impl: str, k: int) -> float:
    """From the last tile of a row to its results."""
    if impl == "triton":
        return TRITON_SELECTION[k] / WARPS[impl] * 5
    scans = 220 * (1 + STEPS_OF_BISECTION) + 40 * math.ceil(TILES / 32)
    looks = math.ceil(k / 4 / 4) * (500 + 4 * 220)
    ranks = math.ceil(FOUND[k] / 128) * FOUND[k] * 8
    return scans + looks + ranks + 8 * k + 4500  # barriers, summary, rewards, arrival


def work(case: Case, loop: sass.RowLoop, registers: int, machine: Machine) -> Work:
    """The row loop ends no sooner than its instructions are issued, nor than its exponentials are through."""
    pairs = inputs.VOCABULARY
    loop_cycles = max(
        pairs * loop.slots_per_pair / 32 / machine.issue_slots,
        pairs * loop.exponentials_per_pair / machine.exponentials,
    )
    return Work(
        memory_us=counted_bytes(case) / case.positions / machine.copy_gb_s / 1e3 * machine.multiprocessors,
        compute_us=machine.us(loop_cycles + other_instructions(case) / machine.issue_slots),
        wait_us=machine.us(other_cycles(case)),
        blocks=machine.registers // (-(-registers // 8) * 8 * WARPS[case.impl] * 32),
    )


def position_us(work: Work) -> tuple[float, float]:
    """The time from one position to the next on one multiprocessor, at best and at worst."""
    alone = work.memory_us + work.compute_us + work.wait_us
    best = max(work.memory_us, work.compute_us, alone / work.blocks)
    queued = [0.0, 0.0]
    rate = 0.0
    for blocks in range(1, work.blocks + 1):
        times = [work.memory_us * (1 + queued[0]), work.compute_us * (1 + queued[1])]
        rate = blocks / (sum(times) + work.wait_us)
        queued = [rate * time for time in times]
    return best, 1 / rate


def many_us(case: Case, work: Work, machine: Machine) -> tuple[float, float]:
    rounds = case.positions / machine.multiprocessors + work.blocks / 3  # the last ones find company leaving
    best, worst = position_us(work)
    return rounds * best + 2 * machine.node_us, rounds * worst + 2 * machine.node_us


def few_us(case: Case, loop: sass.RowLoop, machine: Machine) -> float:
    """A memset and the kernel; loads, bound by bandwidth or by latency; the slices meet; the last of them selects."""
    units = math.ceil(inputs.VOCABULARY / 16384)
    slices = min(units, math.ceil(2 * machine.multiprocessors / case.positions))
    steps = math.ceil(units / slices) * 2
    step_us = machine.load_us + machine.us(loop.slots_per_pair * loop.pairs * WARPS[case.impl] / machine.issue_slots)
    loads = max(steps * step_us, counted_bytes(case) / machine.copy_gb_s / 1e3 + machine.load_us)
    meeting = machine.us(2800) if slices > 1 else 0
    return 2 * machine.node_us + 0.5 + loads + meeting + machine.us(other_cycles(case))


def copy_us(case: Case, machine: Machine) -> float:
    return (
        machine.copy_node_us
        + counted_bytes(replace(case, op="copy", impl="torch", passes="")) / machine.copy_gb_s / 1e3
    )


def predict(case: Case, kernel: sass.Kernel, machine: Machine = H200) -> results.Row:
    """A row like those of a measurement."""
    loop = sass.row_loop(kernel)
    if loop is None:
        raise ValueError(f"predict: {kernel.short_name} must have a row loop")
    needs = work(case, loop, kernel.registers, machine)
    few = case.positions < machine.multiprocessors
    best_us, worst_us = (few_us(case, loop, machine),) * 2 if few else many_us(case, needs, machine)
    time_us = (best_us + worst_us) / 2
    bound = "latency" if few else "memory" if needs.memory_us > needs.compute_us else "computing"
    copied = counted_bytes(replace(case, op="copy", impl="torch", passes=""))

    def of_copy(us: float) -> float:
        return _digits(counted_bytes(case) / us / (copied / copy_us(case, machine)))

    return {
        "measure": "prediction",
        **{name: getattr(case, name) for name in ("op", "dtype", "impl", "isa", "k", "rows", "positions")},
        **({"passes": case.passes} if case.passes else {}),
        "gpu": machine.name,
        "median_ms": _digits(time_us / 1e3),
        "gb_s": _digits(counted_bytes(case) / time_us / 1e3),
        "fraction_of_copy": of_copy(time_us),
        "at_best": of_copy(best_us),
        "at_worst": of_copy(worst_us),
        "bound_by": bound,
        "slots_per_pair": _digits(loop.slots_per_pair),
        "registers": kernel.registers,
        "memory_us": _digits(needs.memory_us),
        "compute_us": _digits(needs.compute_us),
        "wait_us": _digits(needs.wait_us),
        "blocks": needs.blocks,
    }


def cases() -> list[Case]:
    """Those that have a target, and float32."""
    base = Case(LOGIT_OPS[0], "bfloat16", "cuda", device="cuda", positions=8192)
    of_both: list[dict[str, Any]] = [
        {},
        {"rows": "ascending"},
        {"dtype": "float32", "positions": 2048},
        {"impl": "triton"},
    ]
    of_one: list[dict[str, Any]] = [{"k": 64}, {"k": 256}, *({"positions": positions} for positions in (1, 16, 64))]
    return [
        *(replace(base, op=op, **fields) for fields in of_both for op in LOGIT_OPS),
        *(replace(base, **fields) for fields in of_one),
        *(replace(base, op=loss, passes=passes) for loss in LOSSES for passes in ("forward", "backward")),
    ]


_digits = functools.partial(results.digits, count=3)


def kernel_of(case: Case, kernels: Sequence[sass.Kernel]) -> sass.Kernel | None:
    """The kernel that computes the case. Triton's names hold neither type nor k; k=16 takes the fewest registers."""
    types = {"bfloat16": "<BFloat16>", "float32": "<float>"}
    op = OPERATORS[case.op]
    name = f"{op.backward if case.passes == 'backward' else op.forward or case.op}_kernel"
    name += types[case.dtype] if case.impl == "cuda" else ""
    size = getattr(torch, case.dtype).itemsize
    found = [(kernel, sass.row_loop(kernel)) for kernel in kernels if kernel.short_name == name]
    fitting = [kernel for kernel, loop in found if loop and loop.element_bytes == size]
    return min(fitting, key=lambda kernel: kernel.registers, default=None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    kernels = [kernel for file in options.file for kernel in sass.kernels(file) if kernel.arch == H200.arch]
    rows = [predict(case, kernel) for case in cases() if (kernel := kernel_of(case, kernels))]
    results.save(rows, results.FOLDER / results.PREDICTIONS)
    for row in rows:
        print({name: row[name] for name in row if name not in ("measure", "isa", "gpu")})
    return 0
