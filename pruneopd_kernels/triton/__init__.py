"""The operators as Triton kernels, for any GPU that Triton knows. Imported when first used: triton takes a second."""

from importlib import import_module
from typing import Any

from ..ops import BACKWARD_PASSES, OPERATORS

# operator or backward pass: what `impl="triton"` runs, with a record of arguments that have been checked
COMPUTE: dict[str, Any] = {
    name: getattr(import_module(f".{op.stem}", __name__), name) for name, op in (OPERATORS | BACKWARD_PASSES).items()
}
globals().update(COMPUTE)
