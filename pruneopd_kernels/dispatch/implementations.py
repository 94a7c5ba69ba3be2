"""Which implementation computes: the only place that knows them all."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from .. import checks
from ..ops._operator import IMPLS, NAMESPACE, Operator, compiled
from . import cpp, cuda

# implementation: the kind of device it runs on, which an AMD GPU is too
DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
# Whether Triton interprets kernels, on the CPU. Triton reads the same variable when it is imported.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _why_no_triton() -> str | None:
    if platform.system() != "Linux":
        return "Triton runs on Linux"
    if find_spec("triton") is None:
        return "triton is not installed; `pip install triton`, or a torch built for GPUs, which brings it along"
    return None


# implementation: why it is not usable here, or None; found out once, at import
WHY_NOT = {"reference": None, "cpp": cpp.WHY_NOT, "cuda": cuda.WHY_NOT, "triton": _why_no_triton()}
# kind of device: what computes there best, and next best
_PREFERENCES = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


def _usable(why_not: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """For each kind of device, what impl='auto' chooses from, best first; the reference on any other."""
    return {kind: tuple(impl for impl in impls if why_not[impl] is None) for kind, impls in _PREFERENCES.items()}


AUTO = _usable(WHY_NOT)


def choose(op: str, impl: str, device: torch.device, real: bool = True) -> str:
    """The implementation that a call with this `impl` on this device means, usable or not.

    Where the tensors are not `real`, no device is asked anything: the answer may be what a newer GPU would get.
    """
    if impl != "auto":
        checks.one_of(op, "impl", impl, IMPLS)
        return impl
    usable = AUTO.get(device.type, ("reference",))
    return next(impl for impl in usable if impl != "cuda" or not real or cuda.why_not_on(device) is None)


def _why_not_on(impl: str, device: torch.device) -> str | None:
    """Why an implementation that is usable here does not run on this very device."""
    if impl == "triton" and TRITON_INTERPRETS and device.type == "cpu":
        return None
    if device.type != DEVICES.get(impl, device.type):
        return f"it computes on {DEVICES[impl]} and the tensors are on {device}; move them there or pass impl='auto'"
    return cuda.why_not_on(device) if impl == "cuda" else None


def require_usable(op: str, impl: str, device: torch.device) -> None:
    """An implementation that was asked for runs or raises; there is no falling back."""
    why = WHY_NOT[impl] or _why_not_on(impl, device)
    if why is not None:
        raise RuntimeError(f"{op}: impl={impl!r} is not usable here: {why}")


def run(op: Operator, impl: str, a: Any) -> tuple[torch.Tensor, ...]:
    """Compute, with arguments that have been checked. What has a gradient also returns what its backward pass needs."""
    require_usable(op.name, impl, a[0].device)
    if op.is_composed:
        return tuple(op.module.compute(a, functools.partial(run_pass, impl)))
    if impl in ("cpp", "cuda"):
        outputs = getattr(getattr(torch.ops, f"{NAMESPACE}_{impl}"), op.name)(*a)
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return tuple(import_module(f"..{impl}", __package__).COMPUTE[op.name](a))


def run_pass(impl: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run a compiled operator or a forward pass of this implementation, unchecked; return its result."""
    op = _COMPILED[name]
    return op.result(*run(op, impl, op.arguments(args, kwargs)))


_COMPILED = {op.name: op for op in compiled()}
