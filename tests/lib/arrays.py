"""Tensors as NumPy arrays and back: the same memory, strides and dtype; bfloat16 as in ml_dtypes."""

import ml_dtypes
import torch


def as_array(value):
    """What is no tensor stays as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def as_tensor(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
