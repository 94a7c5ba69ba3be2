"""Which implementation computes: the only place that knows them all."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from .. import checks, reference
from . import _cpp

Impl = Literal["auto", "reference", "cpp", "cuda", "triton"]
IMPLS = get_args(Impl)

_NOT_YET = "this version has kernels for the CPU only; a later pruneopd_kernels that has them makes it usable"

# implementation: the kind of device it runs on
DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
# implementation: why it is not usable here, or None; found out once, at import
WHY_NOT = {"reference": None, "cpp": _cpp.WHY_NOT, "cuda": _NOT_YET, "triton": _NOT_YET}


def _first_usable(*impls: str) -> str:
    return next(impl for impl in impls if WHY_NOT[impl] is None)


# kind of device: what impl='auto' takes there; the reference on any other
AUTO = {"cpu": _first_usable("cpp", "reference"), "cuda": _first_usable("cuda", "triton", "reference")}


def choose(op: str, impl: str, device: torch.device) -> str:
    """The implementation that a call with this `impl` on this device means, usable or not."""
    checks.one_of(op, "impl", impl, IMPLS)
    return AUTO.get(device.type, "reference") if impl == "auto" else impl


def require_usable(op: str, impl: str, device: torch.device) -> None:
    """An implementation that was asked for runs or raises; there is no falling back."""
    why = WHY_NOT[impl]
    if why is None and device.type != DEVICES.get(impl, device.type):
        why = f"it computes on {DEVICES[impl]} and the tensors are on {device}; move them there or pass impl='auto'"
    if why is not None:
        raise RuntimeError(f"{op}: impl={impl!r} is not usable here: {why}")


def run(op: str, impl: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Compute, with arguments that have been checked."""
    if impl == "reference":
        return tuple(getattr(reference, op)(**arguments))
    return tuple(getattr(getattr(torch.ops, f"pruneopd_{impl}"), op)(**arguments))
