"""A run from beginning to end: set up or continue, step, evaluate, save, log, stop where asked to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from .config import TrainConfig, with_values
from .data import load_task
from .errors import TrainerError
from .evaluate import evaluate
from .loop import Trainer, responses
from .models import load_pair
from .progress import progress
from .runs import RunFolder
from .samples import Sample, write_html
from .trackers import check_tracker, open_trackers

SHOWN = 8
"""Responses of the last step that samples.html shows."""


def train(config: TrainConfig, out: Path, *, resume: bool = False) -> tuple[dict[str, Any], list[Sample], bool]:
    """Runs all steps that are left, and logs them to the folder `out`.

    Started in several processes (`accelerate launch`), they share the responses of each step; the first of them writes.

    Args:
        config: Every hyperparameter; for a run that is continued it must be the run's own.
        out: The run folder: a new one, or with `resume` one that holds a run.
        resume: Continue from the newest checkpoint, to the same numbers as without the interruption; from the beginning
            where there is none yet.

    Returns:
        The last record, some responses of the last step, and whether all steps are done: Ctrl-C, or a SIGTERM, ends a
        run after the step that it meets, with a checkpoint.

    Raises:
        TrainerError: Something is wrong with what was given, or the loss is not finite; what was saved stays.
    """
    accelerator = Accelerator()
    writes = accelerator.is_main_process
    check_tracker(config)
    folder, checkpoint = open_folder(config, out, resume)
    torch.manual_seed(config.seed)
    pair = load_pair(config, None if checkpoint is None else checkpoint / "student")
    trainer = Trainer(config, pair, load_task(config), accelerator)
    if checkpoint is not None:
        restore(trainer, checkpoint)
    if writes and resume:
        folder.forget_after(-1 if checkpoint is None else trainer.step)
    elif writes:  # not before: what cannot begin leaves no run behind
        RunFolder.create(out, config)
    accelerator.wait_for_everyone()
    continued = None if checkpoint is None else trainer.step
    trackers = open_trackers(config, folder.path, continued) if writes else []

    record: dict[str, Any] = {}
    samples: list[Sample] = []
    with (
        ExitStack() as after,
        progress(config, silent=not writes, done=trainer.step) as display,
        interruption() as interrupted,
    ):
        for tracker in trackers:
            after.callback(tracker.close)

        def log(record: dict[str, Any]) -> None:
            if not writes:
                return
            folder.log(record)
            display.update(record)
            for tracker in trackers:
                tracker.log(record["step"], record)

        def save() -> None:
            if writes:
                folder.save(trainer.step, lambda path: write_checkpoint(trainer, path), config.keep_checkpoints)
            accelerator.wait_for_everyone()

        if checkpoint is None:
            display.status("evaluating the student as it is")
            record = {"step": 0, "method": config.method, "time_s": 0.0, **evaluate(trainer)}
            log(record)
        stopped = False
        while trainer.step < config.steps and not stopped:
            try:
                record = trainer.train_step(display.status)
            except TrainerError as problem:
                raise TrainerError(f"{problem}; {folder.left()}") from problem
            last = trainer.step == config.steps
            if last or trainer.step % config.eval_every == 0:
                display.status("evaluating")
                record |= evaluate(trainer)
            if writes and "accuracy" in record:
                samples = readable(trainer)
                write_html(
                    samples, folder.path / "samples.html", f"{config.method}, step {trainer.step}", config.w_base
                )
            log(record)
            stopped = bool(trainer.total(torch.tensor(float(bool(interrupted)))))
            if last or stopped or trainer.step % config.save_every == 0:
                display.status("saving")
                save()
    return record, samples, trainer.step == config.steps


def evaluate_run(out: Path, prompts: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run, on the run's own prompts or on another number of them.

    Raises:
        TrainerError: There is no run or no checkpoint, or it cannot be read.
    """
    folder = RunFolder.open(out)
    step, checkpoint = folder.latest()
    changes = {"eval_prompts": prompts, "eval_samples": samples}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = with_values(folder.config, changes, "eval")
    trainer = Trainer(config, load_pair(config, checkpoint / "student"), load_task(config), Accelerator())
    return {"step": step, **evaluate(trainer)}


def open_folder(config: TrainConfig, out: Path, resume: bool) -> tuple[RunFolder, Path | None]:
    """The run folder, not yet made if it is new, and the checkpoint that is continued from."""
    if not resume:
        return RunFolder.new(out, config), None
    folder = RunFolder.open(out)
    own, given = folder.config.to_dict(), config.to_dict()
    for name, value in own.items():
        if given[name] != value:
            raise TrainerError(f"the run in {out} can be continued with {name} = {value!r} only, got {given[name]!r}")
    return folder, folder.latest()[1] if folder.has_checkpoint() else None


def write_checkpoint(trainer: Trainer, path: Path) -> None:
    """The student as a model folder of its own, and the state of everything else."""
    trainer.student.save_pretrained(path / "student")
    trainer.pair.tokenizer.save_pretrained(path / "student")
    torch.save(trainer.state_dict(), path / "training.pt")


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Continues from what `write_checkpoint` wrote beside the student."""
    try:
        trainer.load_state_dict(torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # whatever it meets in a file that is not what it says
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise TrainerError(f"the checkpoint {checkpoint} cannot be read: {reason.splitlines()[0]}") from error


@contextmanager
def interruption() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM fills; the second one ends the program at once."""
    received: list[int] = []
    names = signal.SIGINT, signal.SIGTERM
    before = {name: signal.getsignal(name) for name in names}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)

    for name in names:
        signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def readable(trainer: Trainer) -> list[Sample]:
    """Some responses of the last step with what they were trained with, as `samples` shows them."""
    if trainer.last is None:
        return []
    rollouts, scores, given, examples = trainer.last
    grades: list[float] | list[None] = [None] * len(examples)
    if trainer.task.graded:
        grades = trainer.grade(examples, rollouts)
    finished = trainer.finished(rollouts).tolist()
    samples = []
    for row, ids in enumerate(responses(rollouts)[:SHOWN]):
        length = len(ids)
        samples.append(
            Sample(
                prompt=examples[row].prompt,
                tokens=pieces(trainer.pair.tokenizer, ids),
                weights=given.weight[row, :length].tolist(),
                overlaps=scores.overlap[row, :length].tolist(),
                drifts=scores.drift[row, :length].tolist(),
                answer=examples[row].answer,
                grade=grades[row],
                finished=finished[row],
            )
        )
    return samples


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text; a token that leaves a character incomplete adds nothing yet."""
    found, done = [], ""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:count]))
        piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(done) :]
        done = text if piece else done
        found.append(piece)
    return found
