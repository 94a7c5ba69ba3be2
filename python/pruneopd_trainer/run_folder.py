"""The folder of a run: its configuration, one record a step, and checkpoints that are complete or absent."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .atomic import replacing, sync
from .config import TrainConfig, read_config, write_config
from .errors import TrainerError

ALMOST_FULL = 2**20
"""Free bytes below which a library that failed to write, and does not say why, is taken to have found the disk full."""


class RunFolder:
    """A run on disk; made by `create` or `open`. Only one process writes to it, any may read."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"  # a JSON object a line
        self.checkpoints = path / "checkpoints"  # folders step-000020 and so on

    @classmethod
    def new(cls, path: Path, config: TrainConfig) -> "RunFolder":
        """Return what `create` would make, without writing anything.

        Raises:
            TrainerError: The folder contains a run already.
        """
        run = cls(path, config)
        files = run.config_file, run.metrics_file
        if any(map(os.path.exists, files)) or run.has_checkpoint():  # os.path: False if it may not look
            raise TrainerError(f"{path} already holds a run: continue it with --resume, or name another folder")
        return run

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "RunFolder":
        """Make the folder and write config.yaml, which proves that it can be written to.

        Raises:
            TrainerError: The folder contains a run already, or cannot be written to.
        """
        run = cls.new(path, config)
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainerError(f"the folder {path} cannot be made: {error.strerror}") from error
        with replacing(run.config_file) as beside:
            write_config(config, beside)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Return the run in a folder; raises TrainerError if there is none or its configuration is broken."""
        if not os.path.exists(path / "config.yaml"):
            raise TrainerError(f"{path} holds no run: there is no config.yaml in it")
        return cls(path, read_config(path / "config.yaml"))

    # --- records

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, with null for each number that is not finite.

        Raises:
            TrainerError: It cannot be written; the records are then unchanged.
        """
        data = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        try:
            with self.metrics_file.open("ab+", buffering=0) as stream:
                end = os.fstat(stream.fileno()).st_size
                while end and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                    end -= 1
                stream.truncate(end)  # removes a line that a killed process did not finish
                try:
                    while data:  # one write may take only a part, up to the last free byte of the disk
                        data = data[os.write(stream.fileno(), data) :]
                except OSError:
                    stream.truncate(end)
                    raise
        except OSError as error:
            raise self._failed(self.metrics_file, error) from error

    def records(self) -> list[dict[str, Any]]:
        """Return the records in order, without a last line that is not finished yet.

        Raises:
            TrainerError: A finished line is no record, or the file cannot be read.
        """
        try:
            *lines, _ = self.metrics_file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise TrainerError(f"{self.metrics_file} cannot be read: {error.strerror}") from error
        return [self._record(number, line) for number, line in enumerate(lines, 1)]

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and type(record.get("step")) is int):
            shown = line[:40].decode(errors="replace")
            raise TrainerError(f"{self.metrics_file}: line {number} must be an object with a step, got {shown!r}")
        return record

    def forget_after(self, step: int) -> None:
        """Drop the records of later steps, which a run that continues from `step` will write again.

        Raises:
            TrainerError: The records cannot be read or written; they are then unchanged.
        """
        kept = [record for record in self.records() if record["step"] <= step]
        with replacing(self.metrics_file) as beside:
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))

    # --- checkpoints

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Make the checkpoint of a step, then remove the oldest except `keep`; one that exists is not changed.

        Args:
            step: Names the checkpoint.
            write: Gets an empty folder to write the checkpoint's files into.
            keep: How many checkpoints stay, the new one included, >= 1.

        Returns:
            The checkpoint's folder.

        Raises:
            TrainerError: It cannot be written; the older checkpoints are then unchanged.
        """
        folder = self.checkpoints / f"step-{step:06d}"
        beside = _hidden(folder)
        try:
            self._remove_leftovers()
            if not folder.exists():
                beside.mkdir(parents=True)
                write(beside)
                for path in [*beside.rglob("*"), beside]:
                    sync(path)
                os.rename(beside, folder)
                sync(self.checkpoints)
            for _, old in self._checkpoints()[:-keep]:
                os.rename(old, _hidden(old))  # half removed, it must not look like a checkpoint
            self._remove_leftovers()
        except (OSError, RuntimeError, SafetensorError) as error:  # the latter two are PyTorch's and safetensors'
            raise self._failed(folder, error) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return folder

    def latest(self) -> tuple[int, Path]:
        """Return step and folder of the newest checkpoint; raises TrainerError if there is none."""
        if not self.has_checkpoint():
            raise TrainerError(f"{self.path} has no checkpoint yet")
        return self._checkpoints()[-1]

    def has_checkpoint(self) -> bool:
        """Return whether there is one."""
        return bool(self._checkpoints())

    def left(self) -> str:
        """Say what there is to continue from."""
        found = self._checkpoints()
        return f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Return step and folder of every checkpoint, the oldest first."""
        names = [(re.fullmatch(r"step-(\d{6,})", folder.name), folder) for folder in self.checkpoints.glob("step-*")]
        return sorted((int(match[1]), folder) for match, folder in names if match)

    def _remove_leftovers(self) -> None:
        """Remove what a process left that was killed while it saved or removed a checkpoint."""
        for folder in self.checkpoints.glob(".step-*"):
            shutil.rmtree(folder)

    def _failed(self, path: Path, error: Exception) -> TrainerError:
        """Name what cannot be written, why, and what there is to continue from."""
        reason = str(error).partition("\n")[0]
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif shutil.disk_usage(self.path).free < ALMOST_FULL:
            reason = os.strerror(errno.ENOSPC)
        return TrainerError(f"{path} cannot be written: {reason}; {self.left()}")


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


def _finite(value: Any) -> Any:
    """Return the value with None in place of every NaN and infinity, also in lists."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
