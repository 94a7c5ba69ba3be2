"""Files that are either the old or the new ones, even if the process is killed or the disk fills."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TrainerError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a hidden path beside `file` to write to; it replaces `file` at the end, or raises TrainerError."""
    beside = file.with_name(f".{file.name}.partial")
    try:
        yield beside
        sync(beside)
        os.replace(beside, file)
        sync(file.parent)
    except OSError as error:
        raise TrainerError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
