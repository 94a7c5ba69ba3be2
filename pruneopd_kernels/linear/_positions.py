"""Which positions are computed, and in which order: the valid ones, response by response."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Some consecutive valid positions, of one response or of several."""

    start: int  # counted among the valid positions
    stop: int
    places: Tensor  # int64 [stop - start]: where they are among all positions
    cu_seqlens: Tensor  # int32 [B + 1]: where each response's begin and end in the chunk; most are empty


class Positions:
    """The valid positions of `[B, T]` or, packed, `[N]`.

    Masked positions are left out from the start, so that they cost no product. Without a mask nothing here waits for a
    GPU; with one, counting the valid positions does.
    """

    def __init__(
        self, shape: Sequence[int], mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
    ) -> None:
        self.shape = tuple(shape)
        self.count_of_all = count = int(torch.Size(shape).numel())
        if cu_seqlens is None:
            ends = torch.arange(shape[0] + 1, device=device) * shape[1]
        else:
            ends = cu_seqlens.to(torch.int64).clamp(0, count)
        if mask is None:
            self.places, self.ends = torch.arange(count, device=device), ends
        else:
            valid = mask.reshape(-1) != 0
            before = torch.nn.functional.pad(valid.cumsum(0), (1, 0))
            self.places, self.ends = valid.nonzero().squeeze(1), before[ends]

    def __len__(self) -> int:
        return len(self.places)

    def chunk(self, start: int, size: int) -> Chunk:
        stop = min(start + size, len(self))
        return Chunk(start, stop, self.places[start:stop], (self.ends.clamp(start, stop) - start).to(torch.int32))

    def end_of_response(self, position: int) -> int:
        """Where the valid positions end of the response that this one belongs to."""
        return self._ends_on_host[bisect_right(self._ends_on_host, position)]

    @cached_property
    def _ends_on_host(self) -> list[int]:
        ends: list[int] = self.ends.tolist()
        return ends


def take(tensor: Tensor, places: Tensor, leading: int) -> Tensor:
    """The rows at these positions of a tensor with so many leading axes, whatever its strides."""
    if leading == 1:
        return tensor[places]
    return tensor[places // tensor.shape[1], places % tensor.shape[1]]


def put(tensor: Tensor, places: Tensor, values: Tensor, leading: int) -> None:
    """The same the other way round; the tensor is contiguous."""
    tensor.view(-1, *tensor.shape[leading:])[places] = values.to(tensor.dtype)
