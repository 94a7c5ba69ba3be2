"""The folder of a run: its configuration, one record a step, and checkpoints that are complete or absent."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .atomic import replacing, sync
from .config import TrainConfig, read_config, write_config
from .errors import TrainerError

ALMOST_FULL = 2**20  # free bytes below which a library that fails to write, without a reason, has found the disk full


class RunFolder:
    """A run on disk; made by `create` or `open`. Only one process writes to it, any may read."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"  # a JSON object a line
        self.checkpoints = path / "checkpoints"  # folders step-000020 and so on

    @classmethod
    def new(cls, path: Path, config: TrainConfig) -> "RunFolder":
        """Return what `create` would make, without writing; raise TrainerError if the folder contains a run."""
        run = cls(path, config)
        files = run.config_file, run.metrics_file
        if any(map(os.path.exists, files)) or run.latest():  # os.path: False if it may not look
            raise TrainerError(f"{path} already holds a run: continue it with --resume, or name another folder")
        return run

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "RunFolder":
        """Make the folder and write config.yaml, which proves that it can be written to."""
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

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, with null for each number that is not finite; a failure leaves the records unchanged."""
        finite = json.loads(json.dumps(record), parse_constant=lambda constant: None)
        data = (json.dumps(finite) + "\n").encode()
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
        """Return the records in order, without a last line that is not finished yet."""
        try:
            *lines, _ = self.metrics_file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise TrainerError(f"{self.metrics_file} cannot be read: {error.strerror}") from error
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            record = None
            with suppress(ValueError):
                record = json.loads(line)
            if not (isinstance(record, dict) and type(record.get("step")) is int):
                shown = line[:40].decode(errors="replace")
                raise TrainerError(f"{self.metrics_file}: line {number} must be an object with a step, got {shown!r}")
            records.append(record)
        return records

    def forget_after(self, step: int) -> None:
        """Drop the records of later steps, which a run that continues from `step` will write again."""
        kept = [record for record in self.records() if record["step"] <= step]
        with replacing(self.metrics_file) as beside:
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Make the checkpoint of a step, and remove all except the `keep` newest; one that exists is not changed.

        `write` gets an empty folder to write the files into. A failure leaves the older checkpoints unchanged.
        """
        folder = self.checkpoints / f"step-{step:06d}"
        beside = folder.with_name(f".{folder.name}")
        try:
            self._remove_leftovers()
            if not folder.exists():
                beside.mkdir(parents=True)
                write(beside)
                for path in [*beside.rglob("*"), beside]:
                    sync(path)
                os.rename(beside, folder)
                sync(self.checkpoints)
            for old in self._checkpoints()[:-keep]:
                os.rename(old, old.with_name(f".{old.name}"))  # half removed, it must not look like a checkpoint
            self._remove_leftovers()
        except (OSError, RuntimeError, SafetensorError) as error:  # the latter two are PyTorch's and safetensors'
            raise self._failed(folder, error) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return folder

    def latest(self) -> Path | None:
        """Return the folder of the newest checkpoint, None if there is none."""
        return next(reversed(self._checkpoints()), None)

    def left(self) -> str:
        """Say what there is to continue from."""
        latest = self.latest()
        return f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"

    def _checkpoints(self) -> list[Path]:
        """Return the folder of every checkpoint, the oldest first."""
        folders = [path for path in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

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
