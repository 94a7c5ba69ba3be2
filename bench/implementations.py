"""Which implementations, with which instruction sets, can be timed on this machine."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

NO_SET = "none"  # in place of an instruction set, where there is no choice of one


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those of the compiled library, best first; empty where it cannot be loaded."""
    try:
        from pruneopd_kernels.ops import _cpp

        return tuple(_cpp.instruction_sets())
    except RuntimeError as reason:
        print(f"bench: the compiled library is not usable here, only the reference is timed: {reason}")
        return ()


@functools.cache
def usable_on(device: str) -> tuple[str, ...]:
    """The implementations for that GPU, the fastest first; for each that does not work here, a line says why."""
    import pruneopd_kernels

    usable = []
    for impl in ("cuda", "triton"):
        try:
            pruneopd_kernels.reliability_from_drift(torch.zeros(1, 2, dtype=torch.bool, device=device), impl=impl)
            usable.append(impl)
        except RuntimeError as reason:
            print(f"bench: {reason}")
    return tuple(usable)


def using(isa: str) -> AbstractContextManager[object]:
    if isa == NO_SET:
        return nullcontext()
    from pruneopd_kernels.ops import _cpp

    setting: AbstractContextManager[object] = _cpp.use_instruction_set(isa)
    return setting


def read_logits(student_logits: Tensor, teacher_logits: Tensor) -> object:
    """Plain reading, the yardstick of every row: the row maxima of both tensors, in the instruction set in use."""
    if instruction_sets():
        return torch.ops.pruneopd_cpp.row_max(student_logits, teacher_logits)
    return student_logits.amax(-1), teacher_logits.amax(-1)


def operator(op: str, impl: str):  # type: ignore[no-untyped-def]  # a public function, or its twin
    """The function a user calls for this operator, bound to the implementation."""
    if impl == "reference":
        from pruneopd_kernels import reference

        return getattr(reference, op)
    import pruneopd_kernels

    return functools.partial(getattr(pruneopd_kernels, op), impl=impl)
