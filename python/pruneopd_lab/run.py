"""A run of the trainer with all that a person sees of it: progress, curves, and responses to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pruneopd_trainer import train as trainer
from pruneopd_trainer.config import TrainConfig, with_values
from pruneopd_trainer.errors import TrainerError
from pruneopd_trainer.evaluate import evaluate
from pruneopd_trainer.loop import Trainer
from pruneopd_trainer.run_folder import RunFolder
from pruneopd_trainer.train import Watcher

from . import presets
from .progress import progress
from .samples import Sample, samples_of, write_html
from .trackers import check_tracker, open_trackers


class Shown(Watcher):
    """Hands records on to the progress bar, the trackers and the page of samples."""

    def __init__(self, run: Trainer, folder: RunFolder, bar: Watcher, trackers: list[Any]) -> None:
        self.run, self.folder, self.bar, self.trackers = run, folder, bar, trackers
        self.samples: list[Sample] = []

    def status(self, text: str) -> None:
        """Show what is going on."""
        self.bar.status(text)

    def log(self, record: dict[str, Any]) -> None:
        """Show the record, and after an evaluation some responses of the step."""
        if "accuracy" in record and record["step"]:
            self.samples = samples_of(self.run)
            title = f"{record['method']}, step {record['step']}"
            write_html(self.samples, self.folder.path / "samples.html", title, self.run.config.w_base)
        self.bar.log(record)
        for tracker in self.trackers:
            tracker.log(record["step"], record)


def train(config: TrainConfig, out: Path, *, resume: bool = False) -> tuple[dict[str, Any], list[Sample], bool]:
    """Run all steps that are left in the folder `out`; `pruneopd_trainer.train.train` says how.

    Returns:
        The last record, some responses of the last step that was evaluated, and whether all steps are done.

    Raises:
        TrainerError: As in `pruneopd_trainer.train.train`, or a tracker does not work.
    """
    check_tracker(config)
    shown: list[Shown] = []

    @contextmanager
    def watch(run: Trainer, folder: RunFolder, continued: int | None) -> Iterator[Watcher]:
        trackers = open_trackers(config, folder.path, continued)
        with ExitStack() as after, progress(config.steps, run.step) as bar:
            for tracker in trackers:
                after.callback(tracker.close)
            shown.append(Shown(run, folder, bar, trackers))
            yield shown[0]

    record, finished = trainer.train(config, out, resume=resume, load=presets.load, watch=watch)
    return record, shown[0].samples if shown else [], finished


def evaluate_run(out: Path, prompts: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, on the run's own prompts or on another number of them.

    Raises:
        TrainerError: There is no run or no checkpoint, or it cannot be read.
    """
    folder = RunFolder.open(out)
    checkpoint = folder.checkpoint()
    if checkpoint is None:
        raise TrainerError(f"{out} has no checkpoint yet")
    changes = {"eval_prompts": prompts, "eval_samples": samples}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = with_values(folder.config, changes, "eval")
    run = Trainer(config, *presets.load(config, checkpoint / "student"), Accelerator())
    return {"step": int(checkpoint.name.removeprefix("step-")), **evaluate(run)}
