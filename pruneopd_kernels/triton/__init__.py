"""The operators as Triton kernels, for any GPU that Triton knows. Imported when first used: triton takes a second."""

from importlib import import_module
from typing import Any

from ..ops._operator import compiled

# operator or pass: what `impl="triton"` runs, with a record of arguments that have been checked
COMPUTE: dict[str, Any] = {op.name: getattr(import_module(f".{op.stem}", __name__), op.name) for op in compiled()}
globals().update(COMPUTE)
