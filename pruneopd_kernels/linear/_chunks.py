"""Chunk after chunk: logits into the same memory, their scores, and the count that is carried on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..drift import next_drift_count
from ..formulas import is_set
from ._positions import Positions, put, take
from ._products import head_of, sum_dtype
from ._scoring import score

CHUNK_BYTES = 2**28  # of one side's logits, if the caller names no size


def prefixes_of(a: Any) -> list[str]:
    """Return the models whose hidden states a record of arguments has, by how the names of their arguments begin."""
    return [prefix for prefix in ("", "student_", "teacher_") if getattr(a, f"{prefix}hidden", None) is not None]


class Side:
    """One model in one pass: its hidden states `[..., H]`, its head, and memory for a chunk's logits."""

    def __init__(self, a: Any, prefix: str) -> None:
        self.hidden, weight, bias, cap = (getattr(a, prefix + x) for x in ("hidden", "weight", "bias", "softcap"))
        self.head = head_of(weight, bias, cap, a.autocast)
        self.memory: Tensor | None = None

    def logits(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states at these positions, as products take them, and their logits.

        The first chunk is the largest. The next one's logits overwrite these.
        """
        hidden = take(self.hidden, places).to(self.head.operands)
        if self.memory is None:
            self.memory = hidden.new_empty(len(places), len(self.head.weight), dtype=self.head.dtype)
        return hidden, self.head.logits(hidden, self.memory[: len(places)])


class Sides(dict[str, Side]):
    """The models that a record of arguments has, by the names of their logits; the differentiable one is the first."""

    def __init__(self, a: Any) -> None:
        super().__init__({f"{prefix}logits": Side(a, prefix) for prefix in prefixes_of(a)})
        self.head = next(iter(self.values())).head

    def logits(self, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the first model's hidden states at these positions, as products take them, and all models' logits."""
        computed = {name: side.logits(places) for name, side in self.items()}
        return next(iter(computed.values()))[0], {name: logits for name, (_, logits) in computed.items()}


def chunk_size_of(a: Any, widest: int | None = None) -> int:
    """Return how many positions a chunk has; `widest` is the largest number of ids, if the heads do not tell it."""
    if a.chunk_size is not None:
        return int(a.chunk_size)
    weights = [getattr(a, f"{prefix}weight") for prefix in prefixes_of(a)]
    return int(max(1, CHUNK_BYTES // max((widest or len(x)) * sum_dtype(x.dtype).itemsize for x in weights)))


class Computed(NamedTuple):
    """One chunk. The next one's logits overwrite these."""

    places: Tensor
    counted: Tensor | None  # bool [c]: False where the response was exhausted before; None: all count
    hidden: Tensor  # the student's, [c, H]
    logits: dict[str, Tensor]
    fields: dict[str, Tensor]  # what a position has
    kept: dict[str, Tensor]  # what the backward pass of a loss needs of a position, besides logits

    def rows(self, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the places that count, and their rows of tensors."""
        if self.counted is None:
            return self.places, tensors
        rows = self.counted.nonzero().squeeze(1)
        return self.places[rows], {name: x[rows] for name, x in tensors.items()}


def positions_of(a: Any) -> Positions:
    """Return the valid positions; with `skip_exhausted`, without responses that the given count has exhausted."""
    shape, mask = a.student_hidden.shape[:-1], a.mask
    if getattr(a, "skip_exhausted", False) and a.drift_count is not None:
        alive = ~is_exhausted(a.drift_count, a.w_drop)
        if a.cu_seqlens is None:
            alive = alive[:, None].expand(shape)
        else:
            alive = alive.repeat_interleave(a.cu_seqlens.diff().to(torch.int64), output_size=shape.numel())
        mask = alive if mask is None else alive & is_set(mask)
    return Positions(shape, mask, a.cu_seqlens, a.student_hidden.device)


def is_exhausted(drift_count: Tensor, w_drop: float) -> Tensor:
    """Return whether R (eq. 9) is 0 after so many drifts."""
    return 1.0 - w_drop * drift_count.to(torch.float64) <= 0.0


def scored_chunks(a: Any, sides: Sides) -> Iterator[Computed]:
    """Compute one chunk after another, in time order along each response: a weight depends on earlier positions.

    There is at least one, though it may be empty. With `skip_exhausted`, the chunk after one whose last response is
    exhausted starts with the next response. On a GPU that waits for each chunk.
    """
    positions, carry, start, is_first = positions_of(a), a.drift_count, 0, True
    while is_first or start < len(positions):
        stop, places, cu_seqlens = positions.chunk(start, a.chunk_size)
        names = ("token_ids", "weight", "teacher_topk_ids", "teacher_topk_logprobs")
        given = {name: getattr(a, name, None) for name in names}
        rows = {name: take(x, places) for name, x in given.items() if x is not None}
        hidden, logits = sides.logits(places)
        fields, drift_count, kept = score(a, logits, rows, cu_seqlens=cu_seqlens, drift_count=carry)
        carry = next_drift_count(drift_count, cu_seqlens, carry)
        start, counted, is_first = stop, None, False
        if getattr(a, "skip_exhausted", False):
            counted = ~is_exhausted(drift_count - fields["drift"].to(torch.int32), a.w_drop)
            if len(places) and bool(is_exhausted(drift_count[-1], a.w_drop)):
                start = positions.end_of_response(start - 1)
        yield Computed(places, counted, hidden, logits, fields, kept)


class Fields(dict[str, Tensor]):
    """The results of all positions: what a masked position has, until a chunk's are put in their places."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def put(self, places: Tensor, values: dict[str, Tensor]) -> None:
        """Put values in their places."""
        for name, value in values.items():
            if name not in self:
                masked = value.new_zeros(value.shape[1:])
                if name.endswith("_ids"):
                    masked += torch.arange(len(masked), device=value.device)
                self[name] = masked.repeat(*self.shape, *[1] * masked.ndim)
            put(self[name], places, value)

    def put_scored(self, chunk: Computed) -> None:
        """Put a chunk's scores in their places where they count, and say that they do."""
        self.put(*chunk.rows(chunk.fields | {"counted": torch.ones_like(chunk.fields["drift"])}))

    def along(self, a: Any) -> dict[str, Tensor]:
        """Return all fields, with C, R, L and E from one scan over all positions."""
        scan = {name: getattr(a, name) for name in ("cu_seqlens", "drift_count", "w_drop", "w_base", "eps")}
        along: Any = a.passes.run("reliability_from_drift", self["drift"], self["counted"], **scan)
        return self | along._asdict()  # type: ignore[no-any-return]
