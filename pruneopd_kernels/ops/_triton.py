"""The operators as Triton kernels (`pruneopd_kernels.triton`), imported when first used."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from typing import Any

from torch import Tensor


def _why_not() -> str | None:
    if platform.system() != "Linux":
        return "Triton runs on Linux"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`, or a torch built for GPUs, which brings it along"
    return None


WHY_NOT = _why_not()


def run(op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Compute, with arguments that have been checked; `op` is an operator of `pruneopd_kernels.schemas`."""
    kernels = importlib.import_module("..triton", __package__)
    return tuple(getattr(kernels, op)(**arguments))
