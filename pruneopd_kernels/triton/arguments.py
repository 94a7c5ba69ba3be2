"""How tensors and scalars reach a kernel."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

# Only whether they are 0 is asked of them.
_AS_SIGNED = {
    torch.bool: torch.int8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def device_of(tensor: Tensor) -> Any:
    """Makes the tensor's device the current one."""
    return torch.cuda.device_of(tensor)


def per_position(tensor: Tensor | None) -> Tensor | None:
    """One value after the other; copied where they do not lie like that."""
    return None if tensor is None else tensor.contiguous().view(-1)


def flags(tensor: Tensor | None) -> Tensor | None:
    """The same, of a dtype that every kernel can compare with 0."""
    if tensor is None:
        return None
    return per_position(tensor.view(_AS_SIGNED.get(tensor.dtype, tensor.dtype)))


def float64_bits(value: float) -> int:
    """A float64 for a kernel (summary.float64), to which a Python float would come as a float32."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


def float32(value: float) -> float:
    """The nearest float32, as a kernel gets it."""
    return ctypes.c_float(value).value
