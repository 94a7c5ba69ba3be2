"""Chunk after chunk: both sides' logits into the same memory, their scores, and the count that is carried on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..drift import next_drift_count
from ..ops import Reliability, reliability_from_drift
from ._declaration import options
from ._positions import Chunk, Positions, put, take
from ._products import Head, autocast_dtype, head_of
from ._scoring import Scored, score, score_candidates

CHUNK_BYTES = 2**28  # of one side's logits, if the caller names no size


class Side(NamedTuple):
    """One model: its hidden states `[..., H]` and its head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class Problem:
    """What is to be computed."""

    a: Any  # the record of all arguments, checked
    student: Side
    teacher: Side | None  # None: a server sent candidates
    chunk_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of what is computed from logits."""
        dtypes = [side.head.dtype for side in (self.student, self.teacher) if side is not None]
        return torch.float64 if torch.float64 in dtypes else torch.float32


def problem_of(a: Any) -> Problem:
    """Return the problem under the autocast in effect now."""
    autocast = autocast_dtype(a.student_hidden.device)
    student = Side(a.student_hidden, head_of(a.student_weight, a.student_bias, autocast))
    teacher = None
    if a.teacher_hidden is not None:
        teacher = Side(a.teacher_hidden, head_of(a.teacher_weight, a.teacher_bias, autocast))
    row_bytes = max(side.head.width * side.head.dtype.itemsize for side in (student, teacher) if side is not None)
    return Problem(a, student, teacher, a.chunk_size or max(1, CHUNK_BYTES // row_bytes))


class Logits:
    """Memory for one chunk's logits of one side, used again for each chunk."""

    def __init__(self, side: Side, chunk_size: int, positions: int) -> None:
        self.side = side
        self.memory = side.hidden.new_empty(min(chunk_size, positions), side.head.width, dtype=side.head.dtype)

    def of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states at these positions, rounded as products take them, and their logits."""
        hidden = take(self.side.hidden, places).to(self.side.head.operands)
        logits = self.memory[: len(places)]
        self.side.head.logits(hidden, logits)
        return hidden, logits


class Computed(NamedTuple):
    """One chunk. The next one's logits overwrite these."""

    chunk: Chunk
    counted: Tensor | None  # bool [c]: False where the response was exhausted before; None: all count
    hidden: Tensor  # the student's, [c, H]
    student_logits: Tensor
    teacher_logits: Tensor | None
    scored: Scored


def positions_of(problem: Problem) -> Positions:
    """Return the valid positions; with `skip_exhausted`, without responses that the given count has exhausted."""
    a, shape, mask = problem.a, problem.student.hidden.shape[:-1], problem.a.mask
    if getattr(a, "skip_exhausted", False) and a.drift_count is not None:
        alive = ~is_exhausted(a.drift_count, a.w_drop)
        if a.cu_seqlens is None:
            alive = alive[:, None].expand(shape)
        else:
            alive = alive.repeat_interleave(a.cu_seqlens.diff().to(torch.int64), output_size=shape.numel())
        mask = alive if mask is None else alive & (mask != 0)
    return Positions(shape, mask, a.cu_seqlens, problem.student.hidden.device)


def is_exhausted(drift_count: Tensor, w_drop: float) -> Tensor:
    """Return whether R (eq. 9) is 0 after so many drifts."""
    return 1.0 - w_drop * drift_count.to(torch.float64) <= 0.0


def computed_chunks(problem: Problem, positions: Positions) -> Iterator[Computed]:
    """Compute one chunk after another, in time order along each response: a weight depends on earlier positions.

    There is at least one, though it may be empty. With `skip_exhausted`, each chunk is followed by the question whether
    its last response is exhausted. If so, the next chunk starts with the next response. On a GPU that waits for the
    chunk.
    """
    a, size = problem.a, problem.chunk_size
    student = Logits(problem.student, size, len(positions))
    teacher = None if problem.teacher is None else Logits(problem.teacher, size, len(positions))
    carry, start, is_first = a.drift_count, 0, True
    while is_first or start < len(positions):
        chunk = positions.chunk(start, size)
        token_ids = None if a.token_ids is None else take(a.token_ids, chunk.places)
        along = {"token_ids": token_ids, "cu_seqlens": chunk.cu_seqlens, "drift_count": carry}
        hidden, student_logits = student.of(chunk.places)
        if teacher is None:
            teacher_logits = None
            ids, logprobs = (take(sent, chunk.places) for sent in (a.teacher_topk_ids, a.teacher_topk_logprobs))
            scored = score_candidates(student_logits, ids, logprobs, a, **along)
        else:
            _, teacher_logits = teacher.of(chunk.places)
            scored = score(student_logits, teacher_logits, a, **along)
        drift_count, drift = scored.reliability.drift_count, scored.reliability.drift
        carry = next_drift_count(drift_count, chunk.cu_seqlens, carry)
        start, counted, is_first = chunk.stop, None, False
        if getattr(a, "skip_exhausted", False):
            counted = ~is_exhausted(drift_count - drift.to(torch.int32), a.w_drop)
            if len(chunk.places) and bool(is_exhausted(drift_count[-1], a.w_drop)):
                start = positions.end_of_response(start - 1)
        yield Computed(chunk, counted, hidden, student_logits, teacher_logits, scored)


class Fields(dict[str, Tensor]):
    """The results of all positions: what a masked position has, until a chunk's are put in their places."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def put(self, places: Tensor, values: dict[str, Tensor], counted: Tensor | None = None) -> None:
        """Put a chunk's values in their places, except where they do not count."""
        for name, value in values.items():
            masked = value.new_zeros(value.shape[1:])
            if name.endswith("_ids"):
                masked += torch.arange(len(masked), device=value.device)
            if name not in self:
                self[name] = masked.repeat(*self.shape, *[1] * masked.ndim)
            if counted is not None:
                value = torch.where(counted[:, None] if masked.ndim else counted, value, masked)
            put(self[name], places, value)

    def put_computed(self, computed: Computed, dtype: torch.dtype) -> None:
        """Put what does not follow from a scan over all positions; in this dtype what is computed from logits."""
        scored, counted = computed.scored, computed.counted
        drift = scored.reliability.drift
        values = {name: getattr(scored.reliability, name) for name in ("overlap", "drift", "topk_ids")}
        values["counted"] = torch.ones_like(drift) if counted is None else counted
        floats = {"rewards": scored.reliability.rewards, "entropy": scored.entropy}
        floats["loss"] = None if scored.terms is None else scored.terms.loss
        values.update({name: value.to(dtype) for name, value in floats.items() if value is not None})
        self.put(computed.chunk.places, values, counted)

    def reliability(self, a: Any) -> Reliability:
        """Return all fields, with C, R, L and E from one scan over all positions."""
        along = reliability_from_drift(
            self["drift"], self["counted"], cu_seqlens=a.cu_seqlens, drift_count=a.drift_count,
            **options("reliability_from_drift", a),
        )  # fmt: skip
        return Reliability(self["overlap"], self["drift"], *along, self["topk_ids"], self["rewards"])
