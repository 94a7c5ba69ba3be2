"""How tensors and scalars reach a kernel."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from ..formulas import MASS_TOLERANCE, is_set

# Kernels only compare these with 0.
_AS_SIGNED = {torch.bool: torch.int8, torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def outputs_of(a: Any, *dtypes: torch.dtype, last: tuple[int, ...] = ()) -> list[Tensor]:
    """Return an output of each dtype, not initialised, of shape `[..., *last]`; `...` are the positions."""
    shape = (*a[0].shape[:-1], *last)
    return [a[0].new_empty(shape, dtype=dtype) for dtype in dtypes]


def per_position(tensor: Tensor | None) -> Tensor | None:
    """Return the values as one contiguous axis, a copy if they are strided."""
    return None if tensor is None else tensor.contiguous().view(-1)


def flags(tensor: Tensor | None) -> Tensor | None:
    """Return the same in a dtype that a kernel can compare with 0."""
    if tensor is None:
        return None
    tensor = is_set(tensor) if tensor.is_floating_point() else tensor
    return per_position(tensor.view(_AS_SIGNED.get(tensor.dtype, tensor.dtype)))


def mass_of_nucleus(top_p: float) -> float:
    """Return the mass that completes a nucleus (eq. 14-16); with a top_p of 1 all candidates are in it."""
    return math.inf if top_p == 1 else top_p - MASS_TOLERANCE


def float64_bits(value: float | None) -> int | None:
    """Return the bits of a float64 for a kernel (summary.float64), which would get a Python float as a float32."""
    return None if value is None else int(struct.unpack("q", struct.pack("d", value))[0])
