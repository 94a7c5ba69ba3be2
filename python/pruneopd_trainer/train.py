"""A run from beginning to end: set up or continue, step, evaluate, save, log, stop when interrupted."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from .config import TrainConfig
from .data import PromptFile, Task
from .errors import TrainerError, reason, shown
from .evaluate import evaluate
from .loop import NotFiniteError, Trainer
from .models import Pair, load_pair
from .run_folder import RunFolder, locked

Load = Callable[[TrainConfig, Path | None], tuple[Pair, Task]]
"""Loads models and task of a configuration; a folder is a checkpoint's student, in place of the configuration's."""


class Watcher:
    """What a run reports to while it goes on; this one prints a line for each step on stderr."""

    def status(self, text: str) -> None:
        """Take what is going on, such as `sampling`."""

    def log(self, record: dict[str, Any]) -> None:
        """Take the record of a step, after metrics.jsonl has it."""
        names = ("time_s", "tokens_generated", "overlap", "budget", "eval_reverse_kl")
        shown = (f"{name} {record[name]:.4g}" for name in names if record.get(name) is not None)
        print(f"step {record['step']}", *shown, sep="  ", file=sys.stderr, flush=True)


Watch = Callable[[Trainer, RunFolder, int | None], AbstractContextManager[Watcher]]
"""Begins to watch a run in its folder; an integer is the step that it is continued from."""


def from_folders(config: TrainConfig, student: Path | None = None) -> tuple[Pair, Task]:
    """Load the models and the prompts that the configuration names; responses are not graded."""
    if config.data is None:
        raise TrainerError("TrainConfig: data must be a JSONL file, got None")
    return load_pair(config, student), PromptFile(config.data, config.seed)


def train(
    config: TrainConfig,  # if a run is continued, its own
    out: Path,  # the run folder: a new one, or with `resume` one that contains a run
    *,
    resume: bool = False,  # from the newest checkpoint, to the same numbers as without the interruption
    load: Load = from_folders,
    watch: Watch | None = None,  # shows the run while it goes on, in the first process
) -> tuple[dict[str, Any], bool]:
    """Run all steps that are left; return the last record, and whether all steps are done.

    Started in several processes (`torchrun`), they share the responses of each step; the first of them writes.
    Ctrl-C, or a SIGTERM, ends a run after the current step, with a checkpoint.
    """
    accelerator = Accelerator()
    check_processes(accelerator)
    with ExitStack() as held:
        if accelerator.is_main_process and resume:
            held.enter_context(locked(RunFolder.open(out).path))
        folder, checkpoint = open_folder(config, out, resume, accelerator.is_main_process)
        torch.manual_seed(config.seed)
        pair, task = load(config, None if checkpoint is None else checkpoint / "student")
        if config.method == "prune+grpo" and not task.graded:
            source = config.data or f"the preset {config.preset}"
            raise TrainerError(f"TrainConfig: method prune+grpo needs answers to grade by, got none from {source}")
        trainer = Trainer(config, pair, task, accelerator)
        if checkpoint is not None:
            restore(trainer, checkpoint)
        if accelerator.is_main_process and resume:
            folder.restore_records(checkpoint)
        elif accelerator.is_main_process:  # not before: what cannot begin leaves no run behind
            held.enter_context(locked(out))
            RunFolder.create(out, config)
        accelerator.wait_for_everyone()
        try:
            return run_steps(trainer, folder, checkpoint is None, watch)
        except TrainerError:
            if accelerator.is_main_process and not resume and trainer.step == 0:
                folder.remove()  # the corrected command may name the same folder
            raise


def run_steps(trainer: Trainer, folder: RunFolder, is_new: bool, watch: Watch | None) -> tuple[dict[str, Any], bool]:
    """Run the steps that are left; return what `train` returns."""
    config, accelerator, writes = trainer.config, trainer.accelerator, trainer.accelerator.is_main_process
    watching = watch(trainer, folder, None if is_new else trainer.step) if watch and writes else nullcontext(Watcher())
    record: dict[str, Any] = {}
    with watching as watcher, interruption() as interrupted:

        def log(record: dict[str, Any]) -> None:
            if writes:
                folder.log(record)
                watcher.log(record)

        if is_new:
            watcher.status("evaluating the student as it is")
            record = {"step": 0, "method": config.method, "time_s": 0.0, **evaluate(trainer)}
            log(record)
        stopped = False
        while trainer.step < config.steps and not stopped:
            try:
                record = trainer.train_step(watcher.status)
                last = trainer.step == config.steps
                evaluates = last or trainer.step % config.eval_every == 0
                if evaluates:
                    watcher.status("evaluating")
                    trainer.require_finite_logits()
                    record |= evaluate(trainer)
                log(record)
                stopped = bool(trainer.total(torch.tensor(float(bool(interrupted)))))
                if last or stopped or trainer.step % config.save_every == 0:
                    watcher.status("saving")
                    if not evaluates:
                        trainer.require_finite_logits()
                    if writes:
                        folder.save(trainer.step, lambda path: write_checkpoint(trainer, path), config.keep_checkpoints)
                    accelerator.wait_for_everyone()
            except NotFiniteError as problem:
                raise TrainerError(f"{problem}; {folder.left()}") from problem
    return record, trainer.step >= config.steps


def check_processes(accelerator: Accelerator) -> None:
    """Raise TrainerError if the processes do not know each other, or share a model in a way that is not supported."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes == 1 and launched not in ("", "0", "1"):
        rule = "must know each other: without GPUs, set ACCELERATE_USE_CPU=true"
        raise TrainerError(f"the processes {rule}, got WORLD_SIZE={shown(launched)} and one process")
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        rule = "must hold a whole student in each process; for larger ones use TRL or verl"
        raise TrainerError(f"the trainer {rule} (docs/integrations), got {kind}")


def open_folder(config: TrainConfig, out: Path, resume: bool, is_main: bool) -> tuple[RunFolder, Path | None]:
    """Return the run folder, not yet made if it is new, and the checkpoint to continue from."""
    if not resume:  # another process might find what the main one has made
        return RunFolder.new(out, config) if is_main else RunFolder(out, config), None
    folder = RunFolder.open(out)
    given = config.to_dict()
    for name, value in folder.config.to_dict().items():
        if given[name] != value:
            rule = f"can be continued with {name} = {shown(value)} only"
            raise TrainerError(f"the run in {out} {rule}, got {shown(given[name])}")
    return folder, folder.checkpoint()


def write_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the student as a model folder of its own, and the state of everything else."""
    trainer.student.save_pretrained(path / "student")
    trainer.pair.tokenizer.save_pretrained(path / "student")
    torch.save(trainer.state_dict(), path / "training.pt")


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Continue from what `write_checkpoint` wrote beside the student."""
    try:
        trainer.load_state_dict(torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # whatever it meets in a broken file
        why = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        raise TrainerError(f"the checkpoint {checkpoint} cannot be read: {why}") from error


@contextmanager
def interruption() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM fills; the second one ends the program at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
