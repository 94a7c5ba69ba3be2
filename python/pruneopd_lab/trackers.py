"""Curves while a run goes on: in TensorBoard, and with trackio or Weights & Biases where one of them is asked for."""

import importlib
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from pruneopd_trainer.config import TrainConfig
from pruneopd_trainer.errors import TrainerError

PROJECT = "pruneopd"
"""What trackio and Weights & Biases file every run under."""


class Tracker(Protocol):
    """Draws curves."""

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a point to every curve that the record has a number for."""

    def close(self) -> None:
        """End the curves."""


def check_tracker(config: TrainConfig) -> None:
    """Raise TrainerError where the package of `config.tracker` is not installed; costs nothing."""
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise TrainerError(f"tracker = {config.tracker} needs the package {config.tracker}, which is not installed")


def open_trackers(config: TrainConfig, folder: Path, continued: int | None = None) -> list[Tracker]:
    """Open TensorBoard, whose files go into the run's folder, and the tracker of the configuration.

    A run that is `continued` from a step loses the later points of its curves.
    """
    check_tracker(config)
    trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", continued)]
    if config.tracker != "none":
        trackers.append(Remote(config, folder, continued is not None))
    return trackers


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a record can be a point of a curve: no text, no lists, nothing undefined, and not the step."""
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, continued: int | None) -> None:
        self.folder = folder
        try:
            self.writer = SummaryWriter(str(folder), purge_step=None if continued is None else continued + 1)
        except OSError as error:
            raise self._failed(error) from error

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a point to every curve, on the disk when this returns."""
        try:
            for name, value in numbers(record).items():
                self.writer.add_scalar(_group(name), value, step)
            self.writer.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """End the event file."""
        with suppress(OSError):  # `log` has written all there was, or has told that it could not
            self.writer.close()

    def _failed(self, error: OSError) -> TrainerError:
        return TrainerError(f"TensorBoard cannot write to {self.folder}: {error.strerror or error}")


def _group(name: str) -> str:
    """Return the name under which TensorBoard has a curve, by what it is about: evaluations beside each other."""
    return f"evaluation/{name}" if name.startswith(("accuracy", "eval_")) else f"training/{name}"


class Remote:
    """A run of trackio or of Weights & Biases, which have the same interface."""

    def __init__(self, config: TrainConfig, folder: Path, continued: bool) -> None:
        self.name = config.tracker
        options: dict[str, Any] = {"project": PROJECT, "name": folder.resolve().name, "config": config.to_dict()}
        if self.name == "trackio":
            options["resume"] = "allow" if continued else "never"  # it knows a run by its name
        else:
            file = folder / "wandb.id"  # by which Weights & Biases knows a run
            known = file.read_text() if continued and file.exists() else None
            options |= {"dir": str(folder), "id": known, "resume": "allow"}
        try:
            self.run = importlib.import_module(self.name).init(**options)
            if self.name == "wandb":
                file.write_text(self.run.id)
        except Exception as error:  # of the network, of an account, of the package's own
            raise TrainerError(f"the tracker {self.name} does not start: {_first_line(error)}") from error

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a point to every curve."""
        try:
            self.run.log(numbers(record), step=step)
        except Exception as error:
            raise TrainerError(f"the tracker {self.name} takes no more records: {_first_line(error)}") from error

    def close(self) -> None:
        """Send what has not been sent, and ends the run."""
        try:
            self.run.finish()
        except Exception as error:
            raise TrainerError(f"the tracker {self.name} does not finish: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
