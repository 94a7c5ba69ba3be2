"""Rows of results: what is written for one case, and the JSON lines they are kept in.

`fraction_of_read_min` is the ratio of the two minima. On a busy machine it is the steadier one, but a lucky minimum on
one side makes it wrong; what is published is the ratio of medians, from a machine with nothing else to do.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import LOGIT_OPS, PEERS, TOPK_OPS, Case, counted_bytes, inputs
from bench.implementations import instruction_sets
from bench.protocol import Timing

FOLDER = Path(__file__).parent / "results"
LOAD_AVERAGE = round(os.getloadavg()[0], 1)  # of the last minute, before this program added to it
BUSY = 0.5  # a load average above it means that other programs were running
Row = dict[str, Any]


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device() -> str:
    """The name of this machine's file: processor and best instruction set."""
    name = f"{cpu()} {(instruction_sets() or ('reference',))[0]}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def versions() -> Row:
    try:
        from importlib.metadata import version

        own = version("pruneopd-kernels")
    except ImportError:
        own = "unknown"
    return {"pruneopd_kernels": own, "torch": torch.__version__, "python": platform.python_version()}


def time_rows(timings: Mapping[Case, Timing]) -> list[Row]:
    """One row a case, with the ratios to the readings and peers of the same run."""
    rows = []
    for case, timing in timings.items():
        size = counted_bytes(case)
        row = _head("time", case) | {
            "rounds": timing.rounds,
            "median_ms": _digits(timing.median_s * 1e3),
            "min_ms": _digits(timing.min_s * 1e3),
            "counted_bytes": size,
            "gb_s": _digits(size / timing.median_s / 1e9),
        }
        for name, other in _compared_with(case).items():
            if other in timings and other != case:
                row[name] = _digits(timings[other].median_s / timing.median_s)
            if name == "fraction_of_read" and other in timings:
                row["fraction_of_read_min"] = _digits(timings[other].min_s / timing.min_s)
        base = Case(case.op, case.dtype, case.impl, case.isa)
        if case.op in LOGIT_OPS and base != case and base in timings:
            row["time_over_k16_random"] = _digits(timing.median_s / timings[base].median_s)
        rows.append(row)
    return rows


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def memory_row(case: Case, extra_bytes: int, threads: int) -> Row:
    return _head("memory", case) | {"extra_bytes": extra_bytes, "extra_bytes_per_thread": extra_bytes // threads}


def _head(measure: str, case: Case) -> Row:
    return {
        "measure": measure,
        "op": case.op,
        "dtype": case.dtype,
        "impl": case.impl,
        "isa": case.isa,
        "k": case.k,
        "rows": case.rows,
        "shape": list(inputs(case)[0].shape),
        "threads": torch.get_num_threads(),
        "cpu": cpu(),
        **versions(),
        "load_average": LOAD_AVERAGE,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _compared_with(case: Case) -> dict[str, Case]:
    """Name of a ratio -> the case whose time is divided by this one's."""
    peers = {f"times_faster_than_{peer}": Case(case.op, case.dtype, peer) for peer in PEERS}
    if case.op == "read" or case.k != 16 or case.rows != "random" or case.impl in PEERS:
        peers = {}
    if case.op in TOPK_OPS or case.impl in PEERS or case.op == "read":
        return peers
    return {"fraction_of_read": Case("read", case.dtype, case.impl, case.isa, rows=case.rows)} | peers


def key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("measure", "op", "dtype", "impl", "isa", "k", "rows", "threads"))


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows, each in the place of an older one with the same key."""
    merged = {key(row): row for row in [*load(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in merged.values()))
