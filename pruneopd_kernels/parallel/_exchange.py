"""The second exchange: all that one rank has to tell the others, as the bits of one tensor."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ._agreement import Slices

P = ParamSpec("P")
R = TypeVar("R")

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def gather(slices: Slices, shape: torch.Size, dtype: torch.dtype, *mine: Tensor) -> list[Tensor]:
    """Return what every rank sends, stacked on a first axis.

    The tensors are `[*shape]` or `[*shape, c]`, ids (int64) or floats. Floats travel as `dtype`, ids as integers of its
    size. All come back in float64 and int64.
    """
    ranks, positions = dist.get_world_size(slices.group), shape.numel()
    columns = [x.shape[len(shape) :].numel() for x in mine]
    packed = torch.cat([_bits(x.reshape(positions, c), dtype) for x, c in zip(mine, columns, strict=True)], -1)
    everyone = packed.new_empty((ranks, *packed.shape))
    dist.all_gather(list(everyone.unbind()), packed, group=slices.group)
    return [
        (bits.view(dtype).to(torch.float64) if x.is_floating_point() else bits.to(torch.int64)).reshape(ranks, *x.shape)
        for bits, x in zip(everyone.split(columns, -1), mine, strict=True)
    ]


def _bits(field: Tensor, dtype: torch.dtype) -> Tensor:
    return field.to(dtype).view(BITS[dtype]) if field.is_floating_point() else field.to(BITS[dtype])


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """An exchange is no part of a graph of `torch.compile`: what is compiled ends before it and goes on after it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and nothing has been compiled yet
            return function(*args, **kwargs)
        disabled: Callable[P, R] = torch.compiler.disable(function, reason="it exchanges with other ranks")
        return disabled(*args, **kwargs)

    return call
