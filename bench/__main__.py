"""The command line of the benchmarks.

python -m bench                                    everything, under six minutes on two cores; writes the results
python -m bench --only reliability --dtype bfloat16 --isa avx512      a part; prints only, unless --save is given
python -m bench check                              the saved results against the project's targets
python -m bench table                              writes the saved results into the README and the documentation
python -m bench chart                              draws the README's bar chart of them

If there is a GPU, it is what is measured; --device cpu measures the processor there. Each of these has a --help of its
own:

python -m bench linear           losses from hidden states
python -m bench parallel         a vocabulary that is split over several processes
python -m bench step             a training step from logits: `opd_loss`, PyTorch, `torch.compile`
python -m bench trl, verl        losses of other people's trainers
python -m bench sampled_drift    drift by the sampled token against drift by overlap, on real models
python -m bench count            counts the instructions that the CUDA kernels execute
python -m bench sass             counts instructions in the kernels' machine code
python -m bench predict          computes from them what the kernels should take
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import answers, cases, devices, inputs, libraries, memory, plan, timing
from bench.measure.cases import Case
from bench.measure.implementations import instruction_sets
from bench.measure.plan import Wanted
from bench.measure.timing import Contender, Timing
from bench.operators import OPERATORS, USUAL
from bench.report import chart, tables, targets
from bench.report import rows as results

OTHERS = {name: f"bench.studies.{name}" for name in ("linear", "parallel", "sampled_drift", "step", "trl", "verl")}
OTHERS |= {"count": "bench.count.executed", "sass": "bench.count.machine_code", "predict": "bench.count.predictions"}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in OTHERS:
        status: int = importlib.import_module(OTHERS[given[0]]).main(given[1:])
        return status
    options = _parse(given)
    if options.command == "table":
        return tables.write(options.file)
    if options.command == "chart":
        return chart.write(options.file)
    if options.command == "check":
        files = [options.file] if options.file else results.saved()
        return max([targets.report(file) for file in files], default=1)
    options.file = options.file or results.file_of(options.device)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    wanted, whole = _wanted(options)
    run = _on_cpu if options.device == "cpu" else _on_gpu
    wrong = run(options, wanted, whole)
    for complaint in wrong:
        print(f"NOT TIMED: {complaint}", file=sys.stderr)
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


def _on_cpu(options: argparse.Namespace, wanted: Wanted, whole: bool) -> list[str]:
    """Save everything at the end, if it is right."""
    print(f"{results.cpu()}, {', '.join(instruction_sets()) or 'reference only'}, {options.threads} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    if results.LOAD_AVERAGE > results.BUSY:
        print(f"other programs are running (load average {results.LOAD_AVERAGE}): not numbers to publish")
    rows: list[results.Row] = []
    wrong: list[str] = []
    for run in filter(None, plan.on_cpu(wanted)):
        contenders = _contenders(run, devices.on_cpu, wrong)
        seconds = options.seconds / 2 if run[0].passes else options.seconds  # a loss has a run of its own
        rows += _rows(contenders, timing.interleave(list(contenders.values()), seconds=seconds))
        _forget()
    if options.memory:
        rows += _memory_on_cpu([row for row in rows if row["k"] == 16 and row["rows"] == "random"], options.threads)
    if (whole and not wrong) or options.save:
        results.save(rows, options.file)
    return wrong


def _on_gpu(options: argparse.Namespace, wanted: Wanted, whole: bool) -> list[str]:
    """Save each run when it ends: the machine may be gone before the last one."""
    print(f"{results.gpu(options.device)}, torch {torch.__version__}", flush=True)
    wrong: list[str] = []
    for run in filter(None, plan.on_gpu(wanted, options.device)):
        contenders = _contenders(run, devices.on_gpu, wrong)
        timings = timing.interleave(list(contenders.values()), seconds=options.seconds, clock=devices.gpu_clock)
        rows = _rows(contenders, timings)
        measured = [case for case in contenders if options.memory and case.op in OPERATORS]
        del contenders  # and their graphs, which hold memory
        if whole or options.save:
            results.save(rows, options.file)
            extra = {case: memory.on_gpu(_outputs_of(cases.call(case))) for case in measured}
            results.save(
                [results.memory_row(case, size, options.threads) for case, size in extra.items()], options.file
            )
        _forget()
    return wrong


def _outputs_of(call: Callable[[], object]) -> Callable[[], Any]:
    return lambda: answers.fields(call()).values()


def _contenders(run: list[Case], make: Callable[[Case], Contender], wrong: list[str]) -> dict[Case, Contender]:
    """Return those that give the right answer."""
    found = {}
    for case in run:
        try:
            if complaints := cases.complaints(case):
                wrong.append(f"{case.name}: {'; '.join(complaints)}")
            else:
                found[case] = make(case)
        except Exception as error:  # out of memory, a kernel's error, another library's: the rest may still run
            wrong.append(f"{case.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return found


def _rows(contenders: dict[Case, Contender], timings: dict[str, Timing]) -> list[results.Row]:
    rows = results.time_rows({case: timings[contender.name] for case, contender in contenders.items()})
    print("\n" + tables.plain(rows), flush=True)
    return rows


def _forget() -> None:
    inputs.forget()
    cases.gold.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_on_cpu(timed: list[results.Row], threads: int) -> list[results.Row]:
    """Measure one process a case; of the instruction sets only the best, because the buffers are the same."""
    best = (instruction_sets() or ("none",))[0]
    chosen = [("cpp", best), *((peer, "none") for peer in ("eager", *USUAL))]
    rows = []
    print("\nmemory beyond inputs and outputs, MiB per thread")
    for row in timed:
        passes = row.get("passes", "")
        if row["op"] in cases.YARDSTICKS or passes == "forward" or (row["impl"], row["isa"]) not in chosen:
            continue
        case = Case(row["op"], row["dtype"], row["impl"], row["isa"], passes=passes)
        try:
            extra = memory.on_cpu(case, threads)
        except RuntimeError as reason:  # where Linux does not say
            print(reason)
            continue
        rows.append(results.memory_row(case, extra, threads))
        print(f"{case.name:56} {extra / threads / 2**20:10.2f}", flush=True)
    return rows


def _wanted(options: argparse.Namespace) -> tuple[Wanted, bool]:
    values = {name: getattr(options, name) for name in ("op", "dtype", "isa", "impl", "k", "rows")}
    whole = not any(values.values()) and not options.no_peers
    slow = () if whole or options.compiled else ("compiled",)
    peers = () if options.no_peers else tuple(peer for peer in cases.PEERS if peer not in slow)
    return Wanted(values, peers, reference=whole), whole


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", nargs="?", choices=("run", "table", "chart", "check"), default="run")
    choose = functools.partial(parser.add_argument, action="append", default=[])
    choose("--only", dest="op", choices=(*OPERATORS, *libraries.PARTS), metavar="OP")
    choose("--dtype", choices=inputs.DTYPES)
    choose("--isa", choices=("avx512", "avx2", "portable"))
    choose("--impl", choices=("cpp", "cuda", "triton", "reference"))
    choose("--k", type=int, choices=(16, 64, 256))
    choose("--rows", choices=("random", "ascending"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="turns of one run; a loss, half (default: 10; on a GPU, 2)")
    parser.add_argument("--no-peers", action="store_true", help="without PyTorch to compare with")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile's peers in a part, too")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--save", action="store_true", help="write the results of a part, too")
    parser.add_argument("--file", type=Path, help="the results to write, to check, or to make the table of")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 10 if options.device == "cpu" else 2
    return options


if __name__ == "__main__":
    sys.exit(main())
