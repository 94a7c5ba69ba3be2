"""Which positions are computed, and in which order: the valid ones, response by response."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formulas import is_set, response_ends


def valid_places(shape: Sequence[int], mask: Tensor | None, device: torch.device) -> Tensor:
    """Return the indices of the valid positions, int64 `[M, 2]` of `[B, T]` positions, or `[M, 1]` of `[N]`.

    Without a mask nothing waits for a GPU. With one, counting the valid positions does.
    """
    if mask is not None:
        return is_set(mask).nonzero()
    return torch.stack(torch.unravel_index(torch.arange(prod(shape), device=device), tuple(shape)), -1)


def take(tensor: Tensor, places: Tensor) -> Tensor:
    """Return the rows at these positions of a tensor with any strides."""
    return tensor[places.unbind(-1)]


def put(tensor: Tensor, places: Tensor, values: Tensor) -> None:
    """Write the rows at these positions."""
    tensor[places.unbind(-1)] = values.to(tensor.dtype)


class Positions:
    """The valid positions of `[B, T]` or, packed, `[N]`. Masked positions cost no product."""

    def __init__(
        self, shape: Sequence[int], mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
    ) -> None:
        self.places = valid_places(shape, mask, device)
        self.ends = response_ends(shape, cu_seqlens, device)  # counted in valid positions
        if mask is not None:
            self.ends = pad(is_set(mask).reshape(-1).cumsum(0), (1, 0))[self.ends]

    def __len__(self) -> int:
        return len(self.places)

    def chunk(self, start: int, size: int) -> tuple[int, Tensor, Tensor]:
        """Return where a chunk ends, its places and its cu_seqlens, in which most responses are empty."""
        stop = min(start + size, len(self))
        return stop, self.places[start:stop], (self.ends.clamp(start, stop) - start).to(torch.int32)

    def end_of_response(self, position: int) -> int:
        """Return where the valid positions end of the response that this position belongs to."""
        return self._ends_on_host[bisect_right(self._ends_on_host, position)]

    @cached_property
    def _ends_on_host(self) -> list[int]:
        ends: list[int] = self.ends.tolist()
        return ends
