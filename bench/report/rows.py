"""Rows of results: what is written for one case, and the JSON lines they are kept in.

`fraction_of_read_min` and `fraction_of_read_write_min` are ratios of two minima. On a busy machine they are steadier,
but a lucky minimum on one side makes them wrong; what is published is the ratio of medians, from a machine with nothing
else to do.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import libraries
from bench.measure.cases import PEERS, YARDSTICKS, Case, counted_bytes, reading
from bench.measure.implementations import NO_SET, instruction_sets
from bench.measure.timing import Timing
from bench.operators import LOGIT_OPS, OPERATORS, TOPK_OPS

FOLDER = Path(__file__).parent.parent / "results"
PREDICTIONS = "predictions.jsonl"  # in the same folder: what bench/count/predictions.py expects of a GPU
COUNTS = "counts.jsonl"  # the same: what bench/count/executed.py counts
LOAD_AVERAGE = round(os.getloadavg()[0], 1)  # of the last minute, before this program added to it
BUSY = 0.5  # a load average above it means that other programs were running
Row = dict[str, Any]
KEY = (  # the case that a row is of
    "measure", "op", "dtype", "impl", "isa", "k", "rows", "positions", "passes", "threads",
    "loss", "reduction", "hidden", "vocabulary", "chunk_size", "exhausted",  # of a loss from hidden states
)  # fmt: skip


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu(device: str) -> str:
    return torch.cuda.get_device_name(device)


def file_of(device: str) -> Path:
    """Return this machine's file: named after the GPU, or after processor and best instruction set."""
    name = f"{cpu()} {(instruction_sets() or ('reference',))[0]}" if device == "cpu" else gpu(device)
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
    return FOLDER / f"{name}.jsonl"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def digits(value: float, count: int = 5) -> float:
    return float(f"{value:.{count}g}")


def head(measure: str, device: str = "cpu", **fields: Any) -> Row:
    """Return what every row says: what was measured, on which machine, with which versions, when."""
    on_cpu = {"threads": torch.get_num_threads(), "cpu": cpu()}
    return {
        "measure": measure,
        **fields,
        **(
            on_cpu if device == "cpu" else {"gpu": gpu(device), "triton": version("triton"), "cuda": torch.version.cuda}
        ),
        "pruneopd_kernels": version("pruneopd-kernels"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": LOAD_AVERAGE,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def times(timing: Timing) -> Row:
    return {
        "rounds": timing.rounds,
        "median_ms": digits(timing.median_s * 1e3),
        "min_ms": digits(timing.min_s * 1e3),
    }


def time_rows(timings: Mapping[Case, Timing]) -> list[Row]:
    """Return one row a case, with the ratios to the readings and peers of the same run."""
    rows = []
    for case, timing in timings.items():
        size = counted_bytes(case)
        row = _head("time", case) | times(timing)
        row |= {"counted_bytes": size, "gb_s": digits(size / timing.median_s / 1e9)}
        for name, other in _compared_with(case).items():
            if other in timings and other != case:
                row[name] = digits(timings[other].median_s / timing.median_s)
            if name.startswith("fraction_of_read") and other in timings:
                row[f"{name}_min"] = digits(timings[other].min_s / timing.min_s)
        copies = [other for other in timings if other.op == "copy"]
        if copies and case.op in OPERATORS:
            (copy,) = copies
            row["fraction_of_copy"] = digits(row["gb_s"] / (counted_bytes(copy) / timings[copy].median_s / 1e9))
        base = replace(case, k=16, rows="random")
        if case.op in LOGIT_OPS and base != case and base in timings:
            row["time_over_k16_random"] = digits(timing.median_s / timings[base].median_s)
        rows.append(row)
    return rows


def memory_row(case: Case, extra_bytes: int, threads: int) -> Row:
    per_thread = {"extra_bytes_per_thread": extra_bytes // threads} if case.device == "cpu" else {}
    return _head("memory", case) | {"extra_bytes": extra_bytes} | per_thread


def _head(measure: str, case: Case) -> Row:
    of_case = {name: getattr(case, name) for name in ("op", "dtype", "impl", "isa", "k", "rows")}
    of_case |= {"passes": case.passes} if case.passes else {}
    of_case |= {"positions": case.positions} if case.device != "cpu" and case.op not in TOPK_OPS else {}
    return head(measure, case.device, **of_case, shape=list(case.shape_of_inputs))


def _compared_with(case: Case) -> dict[str, Case]:
    """Return the name of a ratio -> the case whose time is divided by this one's."""
    no_operator = (*YARDSTICKS, *libraries.PARTS)
    peers = {f"times_faster_than_{peer}": replace(case, impl=peer, isa=NO_SET) for peer in PEERS}
    if case.op in no_operator or case.k != 16 or case.rows != "random" or case.impl in PEERS:
        peers = {}
    if case.op in (*TOPK_OPS, *no_operator) or case.impl in PEERS or case.device != "cpu":
        return peers
    fraction = "fraction_of_read_write" if case.passes == "both" else "fraction_of_read"
    return {fraction: reading(case)} | peers


def key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(name) for name in KEY)


def saved() -> list[Path]:
    """Return the files of all machines whose results are kept."""
    return sorted(path for path in FOLDER.glob("*.jsonl") if path.name not in (PREDICTIONS, COUNTS))


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, each in the place of an older one with the same key."""
    merged = {key(row): row for row in [*load(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in merged.values()))
    print(f"written to {path}", flush=True)
