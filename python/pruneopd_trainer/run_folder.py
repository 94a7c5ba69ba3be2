"""The folder of a run: its configuration, one record a step, and checkpoints that are complete or absent."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .atomic import replacing, sync
from .config import TrainConfig, read_config, write_config
from .errors import TrainerError, reason

RECORDS, CHECKSUMS = "records.jsonl", "checksums.json"  # in a checkpoint: the records so far, and each file's SHA-256
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
        if any(map(os.path.exists, files)) or run.latest():
            raise TrainerError(f"{path} already holds a run: continue it with --resume, or name another folder")
        return run

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "RunFolder":
        """Make the folder and write config.yaml, which proves that it can be written to."""
        run = cls.new(path, config)
        make_folder(path)
        make_folder(run.checkpoints)
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
            with suppress(RecursionError, ValueError):
                record = json.loads(line)
            if not (isinstance(record, dict) and type(record.get("step")) is int):
                shown = line[:40].decode(errors="replace")
                raise TrainerError(f"{self.metrics_file}: line {number} must be an object with a step, got {shown!r}")
            records.append(record)
        return records

    def restore_records(self, checkpoint: Path | None) -> None:
        """Replace the records by those of the checkpoint from which a run continues; without one there are none."""
        with replacing(self.metrics_file) as beside:
            beside.write_bytes(b"" if checkpoint is None else (checkpoint / RECORDS).read_bytes())

    def remove(self) -> None:
        """Remove what `create` and `log` have written."""
        for file in (self.config_file, self.metrics_file):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path):
            with suppress(OSError):  # it contains something else
                folder.rmdir()

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Make the checkpoint of a step, and remove all except the `keep` newest; one that exists is not changed.

        `write` gets an empty folder to write the files into. The records so far and the files' checksums are added. A
        failure leaves the older checkpoints unchanged.
        """
        folder = self.checkpoints / f"step-{step:06d}"
        beside = folder.with_name(f".{folder.name}")
        try:
            self._remove_leftovers()
            if folder not in self._checkpoints():
                if os.path.lexists(folder) and not folder.is_dir():
                    folder.unlink()  # a stray file, which would stand in the way
                beside.mkdir(parents=True)
                write(beside)
                if self.metrics_file.exists():
                    shutil.copyfile(self.metrics_file, beside / RECORDS)
                (beside / CHECKSUMS).write_text(json.dumps(checksums(beside), indent=1))
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

    def checkpoint(self) -> Path | None:
        """Return the newest checkpoint; raise TrainerError if a file in it is not as it was saved."""
        folder = self.latest()
        if folder is None:
            return None
        try:
            now, saved = checksums(folder), json.loads((folder / CHECKSUMS).read_bytes())
        except (OSError, RecursionError, ValueError) as error:
            now, saved = {CHECKSUMS: ""}, {CHECKSUMS: reason(error)}
        if now != saved:
            name = min(now.items() ^ saved.items())[0] if isinstance(saved, dict) else CHECKSUMS
            others = [path.name for path in self._checkpoints()[:-1]]
            instead = f"remove it to continue from {others[-1]}" if others else "there is no other"
            raise TrainerError(f"the checkpoint {folder} is damaged: {name} is not as it was saved; {instead}")
        return folder

    def left(self) -> str:
        """Say what there is to continue from."""
        latest = self.latest()
        return f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"

    def _checkpoints(self) -> list[Path]:
        """Return the folder of every checkpoint, the oldest first."""
        named = [name for name in names_in(self.checkpoints) if re.fullmatch(r"step-\d{6,}", name)]
        folders = [self.checkpoints / name for name in named if names_in(self.checkpoints / name)]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def _remove_leftovers(self) -> None:
        """Remove what a process left that was killed while it saved or removed a checkpoint."""
        for folder in self.checkpoints.glob(".step-*"):
            shutil.rmtree(folder)

    def _failed(self, path: Path, error: Exception) -> TrainerError:
        """Name what cannot be written, why, and what there is to continue from."""
        why = reason(error)
        if not isinstance(error, OSError) and shutil.disk_usage(self.path).free < ALMOST_FULL:
            why = os.strerror(errno.ENOSPC)
        return TrainerError(f"{path} cannot be written: {why}; {self.left()}")


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # the latter: a NUL
        raise TrainerError(f"the folder {path} cannot be made: {reason(error)}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is not there; raise TrainerError if one is in it."""
    make_folder(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise TrainerError(f"another process is writing to {path}: wait until it has ended") from error
    finally:
        os.close(descriptor)


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder; none if it is no folder, or cannot be read."""
    try:
        return os.listdir(folder)
    except (OSError, ValueError):
        return []


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, except of the checksums themselves."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found
