"""The command line of the benchmarks.

python -m bench                                    everything, under five minutes on two cores; writes the results
python -m bench --only reliability --dtype bfloat16 --isa avx512      a part; prints only, unless --save is given
python -m bench check                              the saved results against the project's targets
python -m bench table                              writes the saved results into the README
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import cases, memory, results, table, targets
from bench.cases import Case, Wanted
from bench.implementations import instruction_sets
from bench.protocol import interleave


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.command == "table":
        return table.write(options.file)
    if options.command == "check":
        return targets.report(options.file or results.FOLDER / f"{results.device()}.jsonl")
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    wanted, whole = _wanted(options)
    print(f"{results.cpu()}, {', '.join(instruction_sets()) or 'reference only'}, {options.threads} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    if results.LOAD_AVERAGE > results.BUSY:
        print(f"other programs are running (load average {results.LOAD_AVERAGE}): not numbers to publish")
    rows: list[results.Row] = []
    wrong: list[str] = []
    runs = [cases.logit_cases(dtype, wanted) for dtype in options.dtype or cases.DTYPES] + [
        [case for case in cases.topk_cases(wanted) if case.op == op] for op in cases.TOPK_OPS
    ]
    for run in filter(None, runs):
        rows += _time(run, options.seconds, wrong)
    if options.memory:
        rows += _memory([row for row in rows if row["k"] == 16 and row["rows"] == "random"], options.threads)
    if (whole and not wrong) or options.save:
        path = results.FOLDER / f"{results.device()}.jsonl"
        results.save(rows, path)
        print(f"\nwritten to {path}")
    for complaint in wrong:
        print(f"NOT TIMED: {complaint}", file=sys.stderr)
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


def _time(run: list[Case], seconds: float, wrong: list[str]) -> list[results.Row]:
    right = []
    for case in run:
        if complaints := cases.complaints(case):
            wrong.append(f"{case.name}: {'; '.join(complaints)}")
        else:
            right.append(case)
    timings = interleave([cases.contender(case) for case in right], seconds=seconds)
    rows = results.time_rows({case: timings[case.name] for case in right})
    cases.logits.cache_clear()
    cases.gold.cache_clear()
    print("\n" + table.plain(rows), flush=True)
    return rows


def _memory(timed: list[results.Row], threads: int) -> list[results.Row]:
    """One process a case; of the instruction sets only the best, for the buffers are the same."""
    best = (instruction_sets() or ("none",))[0]
    rows = []
    print("\nmemory beyond inputs and outputs, MiB per thread")
    for row in timed:
        if row["op"] == "read" or (row["impl"], row["isa"]) not in (("cpp", best), ("eager", "none")):
            continue
        case = Case(*(row[name] for name in ("op", "dtype", "impl", "isa")))
        extra = memory.measure(case, threads)
        if extra is not None:
            rows.append(results.memory_row(case, extra, threads))
            print(f"{case.name:50} {extra / threads / 2**20:10.2f}", flush=True)
    return rows


def _wanted(options: argparse.Namespace) -> tuple[Wanted, bool]:
    chosen = (options.only, options.dtype, options.isa, options.k, options.rows)
    whole = not any(chosen) and not options.no_peers
    peers = () if options.no_peers else cases.PEERS if whole or options.compiled else ("eager", "eager_native")
    ops, dtypes, isas, ks, rows = map(tuple, chosen)
    return Wanted(ops, dtypes, isas, ks, rows, peers=peers, reference=whole), whole


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", nargs="?", choices=("run", "table", "check"), default="run")
    parser.add_argument("--only", action="append", default=[], choices=cases.LOGIT_OPS + cases.TOPK_OPS, metavar="OP")
    parser.add_argument("--dtype", action="append", default=[], choices=cases.DTYPES)
    parser.add_argument("--isa", action="append", default=[], choices=("avx512", "avx2", "portable"))
    parser.add_argument("--k", action="append", default=[], type=int, choices=(16, 64, 256))
    parser.add_argument("--rows", action="append", default=[], choices=("random", "ascending"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="how long one run takes turns (default: 10)")
    parser.add_argument("--no-peers", action="store_true", help="without PyTorch to compare with")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile's peers in a part, too")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--save", action="store_true", help="write the results of a part, too")
    parser.add_argument("--file", type=Path, help="table, check: the results to take")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
