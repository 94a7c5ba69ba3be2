"""Everything that is to be done on a machine with a GPU, in one call of at most eight minutes: `make gpu`.

Builds, tests, looks for bad memory accesses and races, measures, and compares with the targets; what matters most comes
first, each step has a limit of its own, and none waits for another to succeed. It leaves a folder (`OUT`, by default
build/gpu) that is of use however early the machine goes away: a log, one JSON line a step, one JSON line a measurement.
It needs no network and installs nothing: the Python that runs it must have torch for CUDA, and cmake, ninja, pybind11,
setuptools, numpy, ml_dtypes, hypothesis and pytest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
ALL_SECONDS = 465
LOG_BYTES = 12 * 2**20  # a file that is larger may not come back from the machine
TAIL_LINES = 15
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it may take; `before` is what must be left for the steps after it."""

    name: str
    seconds: int
    command: tuple[str, ...]
    leave: int = 0
    show: bool = False  # all of its output in the summary, not only the end of a failure's
    unless: str = ""  # not needed where the step of that name has passed


@dataclass(frozen=True)
class Outcome:
    """What became of a step: passed, failed, cut short, or left out."""

    step: str
    status: str
    seconds: float
    command: str


def steps(out: Path, results_name: str) -> list[Step]:
    """In the order of their worth."""
    python = (sys.executable, "-u")
    pytest: tuple[str, ...] = (*python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider")
    pytest += ("--all", "-m", "gpu", "--require-gpu", "--maxfail=40", "--continue-on-collection-errors")
    pytest += ("-n", "8") if find_spec("xdist") else ()
    small = (*python, "-m", "scripts.gpu_small")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20")
    bench = (*python, "-m", "bench", "--device", "cuda", "--file", str(out / results_name))
    measuring = 190  # seconds, with the comparison with the targets
    return [
        Step("facts", 30, ("bash", "-c", FACTS.format(python=sys.executable)), measuring),
        Step("build", 150, (*python, "setup.py", "build_ext", "--inplace"), measuring),
        Step("which implementations", 30, (*python, "-m", "pruneopd_kernels"), measuring),
        Step("small calls of cuda", 40, (*small, "cuda"), measuring),
        Step("small calls of triton", 90, (*small, "triton"), measuring),
        Step("tests but for triton's", 90, (*pytest, "-k", "not triton"), measuring),
        Step("memory accesses", 60, (*sanitizer, "--tool", "memcheck", *small, "cuda"), measuring),
        Step("races", 60, (*sanitizer, "--tool", "racecheck", *small, "cuda"), measuring),
        Step("tests of triton", 120, (*pytest, "-k", "triton"), measuring),
        Step("measurements", 270, bench, 10),
        # An error of a CUDA kernel ends the process that it occurs in, for all other implementations too.
        Step("measurements of triton", 120, (*bench, "--impl", "triton", "--save"), 10, unless="measurements"),
        Step("targets", 30, (*python, "-m", "bench", "check", "--file", str(out / results_name)), show=True),
        Step("losses beside TRL's", 60, (*python, "-m", "bench", "trl", "--file", str(out / "trl.jsonl")), show=True),
        Step("barriers", 40, (*sanitizer, "--tool", "synccheck", *small, "cuda")),
        Step("memory that nobody wrote", 40, (*sanitizer, "--tool", "initcheck", *small, "cuda")),
    ]


FACTS = """
date -u; uname -a; nproc; free -g | head -2; nvidia-smi; nvidia-smi -q -d CLOCK | head -40
nvcc --version; g++ --version | head -1; {python} -m torch.utils.collect_env; {python} -m pip list
"""


def run(step: Step, limit: float, log: BinaryIO) -> Outcome:
    """Run one step, all its output into the log; a step that takes too long ends with everything that it started."""
    log.write(f"\n===== {step.name}: {' '.join(step.command)}\n".encode())
    log.flush()
    started = time.monotonic()
    child = subprocess.Popen(
        step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = child.wait(limit)
        status = "passed" if code == 0 else f"FAILED ({code})"
    except subprocess.TimeoutExpired:
        status = f"CUT SHORT after {limit:.0f} s"
        child.send_signal(signal.SIGINT)  # at which pytest says what it has seen fail
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    finally:
        end_group(child)
    return Outcome(step.name, status, round(time.monotonic() - started, 1), " ".join(step.command))


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End what a step has left behind, the step itself included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_all(plan: list[Step], out: Path, seconds: float = ALL_SECONDS) -> list[Outcome]:
    """Every step that there is time and a program for, and after each a line in steps.jsonl."""
    ends = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    log_file = out / "log.txt"
    with open(out / "steps.jsonl", "w") as lines, open(log_file, "wb") as log:
        for step in plan:
            if any(outcome.step == step.unless and outcome.status == "passed" for outcome in outcomes):
                continue
            limit = min(step.seconds, ends - time.monotonic() - step.leave)
            begins = log.tell()
            if shutil.which(step.command[0]) is None:
                outcome = Outcome(step.name, f"LEFT OUT: there is no {step.command[0]}", 0, " ".join(step.command))
            elif limit < min(5, step.seconds):
                outcome = Outcome(step.name, "LEFT OUT: no time is left", 0, " ".join(step.command))
            else:
                outcome = run(step, limit, log)
            outcomes.append(outcome)
            lines.write(json.dumps(asdict(outcome)) + "\n")
            lines.flush()
            print(f"{outcome.seconds:6.1f} s  {step.name}: {outcome.status}", flush=True)
            if step.show or outcome.status != "passed":
                print_end(log_file, begins, None if step.show else TAIL_LINES)
    shorten(log_file)
    return outcomes


def print_end(log: Path, begins: int, lines: int | None) -> None:
    """The last lines of a step's output, or all of them."""
    text = log.read_bytes()[begins:].decode(errors="replace").rstrip().splitlines()[2:]
    for line in text if lines is None else text[-lines:]:
        print(f"          {line[:200]}", flush=True)


def shorten(log: Path) -> None:
    """Leave out the middle of a log that is too long to be brought home."""
    text = log.read_bytes()
    if len(text) > LOG_BYTES:
        half = LOG_BYTES // 2
        log.write_bytes(text[:half] + b"\n... the middle is left out ...\n" + text[-half:])


def main() -> int:
    """0 if every step passed."""
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu must have a GPU that torch can use, got none in torch {torch.__version__} of {sys.executable}")
        return 1
    from bench.report import rows as results

    major, minor = torch.cuda.get_device_capability()
    os.environ["PRUNEOPD_CUDA"] = "ON"
    os.environ["PRUNEOPD_CUDA_ARCHITECTURES"] = f"{major}{minor}"  # for this GPU only, which takes a third of the time
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"
    out = Path(os.environ.get("OUT") or ROOT / "build/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(steps(out, results.file_of("cuda").name), out)
    print(f"\n{sum(outcome.seconds for outcome in outcomes):.0f} s; what was left is in {out}\n")
    for outcome in outcomes:
        print(f"{outcome.seconds:6.1f} s  {outcome.step}: {outcome.status}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
