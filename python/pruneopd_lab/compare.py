"""`pruneopd compare`: several methods from the same start, with the same prompts, seed by seed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pruneopd_trainer.config import TrainConfig, read_config, with_values, write_config
from pruneopd_trainer.errors import TrainerError, shown
from pruneopd_trainer.run_folder import RunFolder, locked

from .report import report, show
from .run_groups import SUBJECT, Run, read_run

COMMAND = (sys.executable, "-m", "pruneopd_lab")
THE_SAME = ("method", "seed", *SUBJECT)
"""What a method's values cannot change."""
POLL_S = 0.2
SAVING_S = 600.0
"""How long a child that has been interrupted may take to finish its step and save."""


@dataclass(frozen=True)
class Planned:
    """A run to be done."""

    label: str  # the method as it was given, and the seed
    config: TrainConfig  # `final_length` is still to be matched if `model` is not None
    folder: Path
    model: Path | None = None  # the run folder of prune whose mean length `prefix` shall have


def compare(
    base: TrainConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    command: Sequence[str] = COMMAND,
) -> None:
    """Train with each method and each seed, each run in a process of its own, and report.

    What is finished in `out` is kept, what is unfinished is resumed; so after a failure or Ctrl-C the same call goes
    on. The methods take turns within a seed: should the machine become slower or faster, all meet it.

    Args:
        base: The values of all runs, but for the method's own.
        methods: Such as `"opd"` or `"prune:w_drop=0.05:weights=false"`. `prefix` without a `final_length` gets the one
            with which it has the mean length of `prune` of the same seed, if plain `prune` is among the methods.
        seeds: One run of each method for each.
        out: Runs are in `out/<method>/seed-<seed>`, their output in `log.txt` there.
        jobs: How many run at a time; they share the processor's cores.
        command: What `train --config FILE --out DIR` is passed to.

    Raises:
        TrainerError: A method is not valid, `out` holds other runs where these belong, or a run failed.
        KeyboardInterrupt: Ctrl-C; the runs under way have been told to save.
    """
    if jobs < 1:
        raise TrainerError(f"compare: jobs must be at least 1, got {jobs}")
    planned = plan(base, methods, seeds, out)
    for run in planned:
        earlier(run, ignored=("final_length",) if run.model else ())
    with interrupted_by_signals(), locked(out), Display(planned) as display:
        train_all(planned, min(jobs, len(planned)), command, display)
    show(report([out]))


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(base: TrainConfig, methods: Sequence[str], seeds: Sequence[int], out: Path) -> list[Planned]:
    """Return the runs in the order in which they shall start."""
    for name, given in (("methods", methods), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise TrainerError(f"compare: {name} must be one or more and all different, got {list(given)}")
    configs = {spec: parse_method(spec, base) for spec in methods}
    folders = {spec: out / re.sub(r"[^\w.=+-]", "-", spec) for spec in methods}
    for number, spec in enumerate(methods):
        for other in methods[:number]:
            if configs[spec] == configs[other] or folders[spec] == folders[other]:
                raise TrainerError(f"compare: methods must be all different, got {other!r} and {spec!r}")
    planned = []
    for seed in seeds:
        for spec, config in configs.items():
            matched = config.method == "prefix" and "final_length" not in _values(spec) and "prune" in configs
            planned.append(
                Planned(
                    f"{spec} seed {seed}",
                    replace(config, seed=seed),
                    folders[spec] / f"seed-{seed}",
                    folders["prune"] / f"seed-{seed}" if matched else None,
                )
            )
    return planned


def parse_method(spec: str, base: TrainConfig) -> TrainConfig:
    """Return the values of `name[:field=value...]`, such as `prune:w_drop=0.05:weights=false`."""
    try:
        values = {name: yaml.safe_load(text) for name, text in _values(spec).items()}
        return with_values(base, {"method": spec.split(":")[0], **values}, "its values")
    except (TrainerError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise TrainerError(f"the method {spec!r} is not valid: {str(error).splitlines()[0]}") from error


def _values(spec: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in spec.split(":")[1:]:
        name, equals, text = part.partition("=")
        if not equals or name in values:
            raise TrainerError(f"it must be name:field=value..., each field once, got {part!r}")
        if name in THE_SAME:
            raise TrainerError(f"{name} must be the same for all methods, got {part!r}")
        values[name] = text
    return values


def earlier(run: Planned, ignored: Sequence[str] = ()) -> Run | None:
    """Return what the run's folder already contains of it, None if nothing; raise TrainerError for another run."""
    if not os.path.exists(run.folder / "config.yaml"):  # False for a name that no file can have
        return None
    there, here = read_config(run.folder / "config.yaml").to_dict(), run.config.to_dict()
    for name in there:
        if there[name] != here[name] and name not in ("tracker", *ignored):
            values = f"{name} is {shown(there[name])} there and {shown(here[name])} here"
            raise TrainerError(f"the run folder {run.folder} holds another run: {values}")
    return read_run(run.folder) if (run.folder / "metrics.jsonl").exists() else Run(run.folder, run.config, [])


def with_matched_length(run: Planned) -> Planned:
    """`prefix` with the final length at which the mean of its lengths is that of the finished prune run's lengths."""
    if run.model is None:
        return run
    config, model = run.config, read_run(run.model)
    first = model.config.initial_length if model.config.budget else model.config.maximum_length
    lengths = [first, *(metrics["budget"] for metrics in model.steps[:-1])]
    final = round(2 * sum(lengths) / len(lengths) - config.initial_length)
    final = min(max(final, config.minimum_length), config.maximum_length)
    return replace(run, config=replace(config, final_length=final), model=None)


# --- the children -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A run under way."""

    run: Planned
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Where in the log its output begins: a resumed run's follows that of before."""


def train_all(planned: Sequence[Planned], jobs: int, command: Sequence[str], display: Display) -> None:
    """Start the runs in order, as many at a time as `jobs`, and wait for them; an error stops them all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs)), "OMP_WAIT_POLICY": "passive"}
    waiting = list(planned)
    running: list[Child] = []
    done: set[Path] = set()
    try:
        while waiting or running:
            ready = [run for run in waiting if run.model is None or run.model in done]
            if ready and len(running) < jobs:
                waiting.remove(ready[0])
                run = with_matched_length(ready[0])
                before = earlier(run)
                if before and before.finished:
                    done.add(run.folder)
                    display.ended(run, "was finished before")
                else:
                    resume = RunFolder(run.folder, run.config).latest() is not None
                    running.append(launch(run, command, environment, resume))
                    display.began(run, "goes on" if resume else "begins")
                continue
            time.sleep(POLL_S)
            for child in list(running):
                display.reached(child.run, last_step(child.run.folder / "metrics.jsonl"))
                if child.process.poll() is not None:
                    running.remove(child)
                    check(child)
                    done.add(child.run.folder)
                    display.ended(child.run, "is finished")
    finally:
        if running:
            display.say(f"{len(running)} under way: told to save and leave")
        stop(running)


def launch(run: Planned, command: Sequence[str], environment: dict[str, str], resume: bool) -> Child:
    """Start a run as a process, or resume it; what a run without a checkpoint has left is removed."""
    file, log = run.folder.with_name(f"{run.folder.name}.yaml"), run.folder / "log.txt"
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for old in ("config.yaml", "metrics.jsonl"):
                (run.folder / old).unlink(missing_ok=True)
        write_config(run.config, file)
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                [*command, "train", "--config", str(file), "--out", str(run.folder), *(["--resume"] if resume else [])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                preexec_fn=end_with_parent,
                start_new_session=True,  # the terminal's Ctrl-C reaches this process, which passes it on once
            )
            return Child(run, process, log, log_start)
    except OSError as error:
        raise TrainerError(f"the run in {run.folder} cannot be started: {error.strerror}") from error


def end_with_parent() -> None:
    """Have Linux send SIGINT to this process if its parent is killed: it saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def check(child: Child) -> None:
    """Raise TrainerError if a child that has ended has not finished its run."""
    with child.log.open("rb") as log:
        log.seek(child.log_start)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    status = child.process.returncode
    if status != 0:
        ending = f"signal {-status}" if status < 0 else f"status {status}"
        said = f": {lines[-1]}" if lines else ""
        raise TrainerError(f"{child.run.label} ended with {ending}, see {child.log}{said}")
    run = earlier(child.run)
    if run is None or not run.finished:
        reached = f"step {run.last_step if run else 0} of {child.run.config.steps}"
        raise TrainerError(f"{child.run.label} ended at {reached}, see {child.log}")


def stop(children: Sequence[Child]) -> None:
    """Have children save and leave; after SAVING_S, or with a second Ctrl-C, they are killed."""
    try:
        for child in children:
            child.process.send_signal(signal.SIGINT)
        limit = time.monotonic() + SAVING_S
        for child in children:
            child.process.wait(max(0, limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """A closed terminal or a scheduler's SIGTERM is taken as Ctrl-C, so that no child is left behind.

    What is ignored, as SIGHUP under nohup, stays so.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- what is shown ----------------------------------------------------------------------------------------------------


def last_step(file: Path, tail: int = 65536) -> int:
    """Return the step of the last whole line of a metrics.jsonl that is being written, 0 if there is none."""
    try:
        with file.open("rb") as metrics:
            metrics.seek(max(0, file.stat().st_size - tail))
            return int(json.loads(metrics.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


class Display:
    """The runs with their steps: bars on a terminal, else a line when a run begins or ends."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self.console = Console(highlight=False)
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        shown: Any = {"console": self.console, "disable": not self.console.is_terminal}
        self.progress = Progress(TextColumn("{task.description}"), *columns, **shown)
        self.tasks = {
            run.folder: self.progress.add_task(run.label, total=run.config.steps, start=False) for run in planned
        }

    def __enter__(self) -> Display:
        """Start the bars."""
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bars as they are."""
        self.progress.stop()

    def began(self, run: Planned, how: str) -> None:
        """A run is under way."""
        self.progress.start_task(self.tasks[run.folder])
        if not self.console.is_terminal:
            self.say(f"{run.label} {how}")

    def reached(self, run: Planned, step: int) -> None:
        """A run has done `step` steps."""
        self.progress.update(self.tasks[run.folder], completed=step)

    def ended(self, run: Planned, how: str) -> None:
        """A run is at its last step."""
        self.reached(run, run.config.steps)
        self.progress.stop_task(self.tasks[run.folder])
        if not self.console.is_terminal:
            self.say(f"{run.label} {how}")

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, markup=False, soft_wrap=True)
