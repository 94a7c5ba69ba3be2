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
        from pruneopd_kernels.dispatch import cpp

        return tuple(cpp.instruction_sets())
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
    from pruneopd_kernels.dispatch import cpp

    setting: AbstractContextManager[object] = cpp.use_instruction_set(isa)
    return setting


def read_logits(*logits: Tensor) -> tuple[Tensor, ...]:
    """Plain reading, the yardstick of every row: the row maxima, in the instruction set in use.

    It goes through two tensors in step. A single one is read as its two halves.
    """
    pair = logits if len(logits) == 2 else logits[0].chunk(2)
    return tuple(torch.ops.pruneopd_cpp.row_max(*pair) if instruction_sets() else (one.amax(-1) for one in pair))


def read_and_write_logits(student_logits: Tensor, *teacher_logits: Tensor) -> tuple[Tensor, ...]:
    """What a loss and its gradient cannot do without: every tensor read twice, one like the student's written."""
    maxima = read_logits(student_logits, *teacher_logits)
    again = read_logits(*teacher_logits) if teacher_logits else ()
    return (*maxima, *again, student_logits.clone())


def operator(op: str, impl: str):  # type: ignore[no-untyped-def]  # a public function
    """Return the function a user calls for this operator, bound to the implementation."""
    import pruneopd_kernels

    return functools.partial(getattr(pruneopd_kernels, op), impl=impl)
