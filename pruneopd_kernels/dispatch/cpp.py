"""The compiled operators for CPU tensors: `_cpp.so` in the package, which registers `torch.ops.pruneopd_cpp.*`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import checks
from ..ops._operator import NAMESPACE, compiled

PATH = Path(__file__).parents[1] / "_cpp.so"  # not in this folder, where it would hide this file from import

_DEFINITIONS = torch.library.Library(f"{NAMESPACE}_cpp", "DEF")
for _op in compiled():
    _DEFINITIONS.define(_op.private_schema)
# What no public operator shows: the speed of just reading rows, for the benchmarks.
_DEFINITIONS.define("row_max(Tensor student_logits, Tensor teacher_logits) -> (Tensor student_max, Tensor teacher_max)")


def load(path: Path, remedy: str) -> str | None:
    """Load a library; return why that fails and what would help, or None. `remedy` is what makes a missing one."""
    if not path.exists():
        return f"{path} is missing; {remedy}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        return f"{path.name} does not load in torch {torch.__version__} ({why}); it needs torch >= 2.11 or a new build"
    return None


WHY_NOT = load(PATH, "installing the package where a C++20 compiler is found builds it")


def instruction_sets() -> list[str]:
    """The instruction sets that the library has and this processor runs, best first."""
    names = _library().pruneopd_instruction_sets()
    return str(names.decode()).split(",")


def instruction_set() -> str:
    """The instruction set in use: the best one, unless `use_instruction_set` chose another."""
    return str(_library().pruneopd_instruction_set().decode())


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Compute with another instruction set, in the whole process, for tests and benchmarks."""
    checks.one_of("use_instruction_set", "name", name, instruction_sets())
    before = instruction_set()
    _library().pruneopd_set_instruction_set(name.encode())
    try:
        yield
    finally:
        _library().pruneopd_set_instruction_set(before.encode())


def _library() -> ctypes.CDLL:
    if WHY_NOT is not None:
        raise RuntimeError(f"impl='cpp' is not usable here: {WHY_NOT}")
    library = ctypes.CDLL(str(PATH))  # loaded already: the same one
    library.pruneopd_instruction_sets.restype = ctypes.c_char_p
    library.pruneopd_instruction_set.restype = ctypes.c_char_p
    library.pruneopd_set_instruction_set.argtypes = [ctypes.c_char_p]
    return library
