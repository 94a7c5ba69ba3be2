"""Count the instructions that the CUDA kernels execute: nvcc's PTX, run on a CPU.

python -m bench count                                     the cases that the tests hold to bounds; saves the counts
python -m bench count --op token_stats row_stats --dtype float32 --rows random ascending --vocabulary 32000 --k 16 256

A warp issues an instruction once for all of its lanes that take part. For each position, `issued` counts this, and
`float64` the part that computes in float64. `of_threads` is what the threads execute, divided by 32.

PTX is not machine code: ptxas removes instructions, and makes several of a division or a conversion. The counts show
how the work depends on V, on k and on the order of a row. If there is an nvcc, `make test-cuda` compiles the kernels.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import torch
from torch import Tensor

from bench.measure.inputs import DTYPES
from bench.report import rows as results
from pruneopd_kernels.ops import FORWARD_PASSES, OPERATORS

BUILT = Path(__file__).parents[2] / "build" / "tests-cuda"
OPS = ("reliability", "token_stats", "row_stats", "reverse_kl")


@dataclass(frozen=True)
class Counted:
    """A call of an operator."""

    op: str = "reliability"
    dtype: str = "bfloat16"
    rows: str = "random"
    vocabulary: int = 151936
    k: int = 16
    positions: int = 7  # more than six per multiprocessor: rows are not split
    multiprocessors: int = 1  # with more, few rows are split over several blocks


def finite(count: int, x: Tensor) -> Tensor:
    """Return rows of which only the first logits are finite."""
    return torch.where(torch.arange(x.shape[-1]) < count, x, -torch.inf)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "ascending": lambda x: x.sort(-1).values,
    "descending": lambda x: x.sort(-1, descending=True).values,
    "constant": torch.zeros_like,
    "masked": functools.partial(finite, 100),  # as by a grammar
    "ten finite": functools.partial(finite, 10),
}


# Rows, V and k of `reliability` in bfloat16, which the tests hold to bounds.
CASES = (
    *(("random", 151936, k) for k in (16, 64, 256)),
    *(("random", 32000, k) for k in (16, 100, 128, 256)),
    *(("random", 50257, k) for k in (16, 256)),
    ("random", 16384, 64),
    *(("random", 1000, k) for k in (16, 256)),
    *((rows, 151936, k) for rows in ("ascending", "descending") for k in (16, 64, 256)),
    *((rows, 151936, k) for rows in ("masked", "ten finite") for k in (16, 64)),
    *(("constant", 151936, k) for k in (16, 256)),
)


def table() -> list[Counted]:
    """Return these, and the other operators and dtypes."""
    others = [Counted(op, dtype) for op in OPS for dtype in DTYPES if (op, dtype) != (Counted.op, Counted.dtype)]
    return [*(Counted(rows=rows, vocabulary=vocabulary, k=k) for rows, vocabulary, k in CASES), *others]


@functools.cache
def kernels() -> Any:
    """Return the module of compiled PTX, which `make test-cuda` builds."""
    sys.path.insert(0, str(BUILT))
    try:
        return importlib.import_module("_cuda_ptx")
    except ImportError as error:
        raise RuntimeError(f"bench count: {error}; `make test-cuda` builds it where there is nvcc") from error
    finally:
        sys.path.remove(str(BUILT))


def as_array(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.dtype != torch.bfloat16:
        return value.numpy()
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def count(case: Counted) -> results.Row:
    """Run the call; return what its warps issued for each position."""
    declared = (FORWARD_PASSES | OPERATORS)[case.op]
    generator = torch.Generator().manual_seed(case.vocabulary)
    shape = (1, case.positions, case.vocabulary)
    student = torch.randn(shape, generator=generator) * 2.5
    teacher = student + 0.4 * torch.randn(shape, generator=generator)
    student, teacher = (ROWS[case.rows](x).to(getattr(torch, case.dtype)) for x in (student, teacher))
    given = {"student_logits": student, "teacher_logits": teacher, "logits": student, "k": case.k}
    given["token_ids"] = torch.zeros((*shape[:2], 1) if case.op == "row_stats" else shape[:2], dtype=torch.int64)
    named = {name: value for name, value in given.items() if name in declared.parameters}
    module = kernels()
    module.set_emulator(case.multiprocessors, 1)
    module.take_issued()
    arrays = {name: as_array(value) for name, value in declared.arguments((), named)._asdict().items()}
    getattr(module, case.op)(**arrays, num_threads=0)
    module.set_emulator(132, 1)  # as the tests use it
    issued, float64, of_threads = (round(n / case.positions) for n in module.take_issued())
    counts = {"issued": issued, "float64": float64, "of_threads": of_threads // 32}
    return {"measure": "count", **asdict(case), **counts, "per_pair": results.digits(issued * 32 / case.vocabulary, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench count", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = asdict(Counted())
    choices = {"op": OPS, "dtype": DTYPES, "rows": tuple(ROWS)}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", nargs="+", type=type(default), choices=choices.get(name), metavar=name.upper())
    parser.add_argument("--file", type=Path, default=results.FOLDER / results.COUNTS, help="the results to write")
    options = vars(parser.parse_args(arguments))
    axes = [options[name] or [default] for name, default in defaults.items()]
    asked = any(options[name] for name in defaults)
    cases = [Counted(*values) for values in itertools.product(*axes)] if asked else table()
    print("operator     dtype     rows             V    k      issued  float64  of_threads  issued/pair")
    rows = []
    for case in cases:
        rows.append(count(case))
        line = (
            "{op:12} {dtype:9} {rows:10} {vocabulary:7} {k:4} {issued:11,} {float64:8,} {of_threads:11,} {per_pair:12}"
        )
        print(line.format(**rows[-1]), flush=True)
    if not asked:
        results.save(rows, options["file"])
    return 0
