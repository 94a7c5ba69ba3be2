"""Chunk after chunk: logits of both sides into the same memory, their scores, and the count that is carried on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..drift import next_drift_count
from ..ops import OPERATORS, Reliability, reliability_from_drift
from ._positions import Chunk, Positions, put, take
from ._products import Head, autocast_dtype, head_of
from ._scoring import Arguments, Scored, score_candidates, score_logits, terms_of

CHUNK_BYTES = 2**28  # of one side's logits, where the caller has no opinion


class Side(NamedTuple):
    """One model: its hidden states `[..., H]` and its head."""

    hidden: Tensor
    head: Head


class Candidates(NamedTuple):
    """What a teacher's server sends, `[..., k]` each."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Problem:
    """What is to be computed, checked."""

    student: Side
    teacher: Side | Candidates
    mask: Tensor | None
    token_ids: Tensor | None
    cu_seqlens: Tensor | None
    drift_count: Tensor | None
    chunk_size: int
    skip_exhausted: bool
    loss: str | None  # None: reliability alone
    arguments: Arguments

    @property
    def leading(self) -> int:
        return self.student.hidden.ndim - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed from logits."""
        sides = [side for side in (self.student, self.teacher) if isinstance(side, Side)]
        return torch.float64 if any(side.head.dtype == torch.float64 for side in sides) else torch.float32


_NOT_SCALARS = ("mask", "token_ids", "cu_seqlens", "drift_count")


def problem_of(arguments: dict[str, Any]) -> Problem:
    """From the arguments of either operator, checked, under the autocast that they were given in."""
    autocast = autocast_dtype(arguments["student_hidden"].device)

    def side(name: str) -> Side:
        hidden, weight, bias = (arguments[f"{name}_{part}"] for part in ("hidden", "weight", "bias"))
        return Side(hidden, head_of(weight, bias, autocast))

    student = side("student")
    teacher: Side | Candidates
    if arguments["teacher_hidden"] is None:
        teacher = Candidates(arguments["teacher_topk_ids"], arguments["teacher_topk_logprobs"])
    else:
        teacher = side("teacher")
    row_bytes = max(one.head.width * one.head.dtype.itemsize for one in (student, teacher) if isinstance(one, Side))
    along = {name: arguments[name] for name in _NOT_SCALARS}
    scalars = [
        name for name in [*OPERATORS["reliability"].kinds, "impl"] if name in arguments and name not in _NOT_SCALARS
    ]
    return Problem(
        student,
        teacher,
        **along,
        chunk_size=arguments["chunk_size"] or max(1, CHUNK_BYTES // row_bytes),
        skip_exhausted=arguments.get("skip_exhausted", False),
        loss=arguments.get("loss"),
        arguments={name: arguments[name] for name in scalars},
    )


class Logits:
    """Memory for one chunk's logits of one side, used again for each chunk."""

    def __init__(self, side: Side, chunk_size: int, positions: int, leading: int) -> None:
        self.side, self.leading = side, leading
        self.memory = side.hidden.new_empty(min(chunk_size, positions), side.head.width, dtype=side.head.dtype)

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states at these positions, rounded as products take them, and their logits."""
        hidden = take(self.side.hidden, index, self.leading).to(self.side.head.operands)
        logits = self.memory[: len(index)]
        self.side.head.logits(hidden, logits)
        return hidden, logits


class Computed(NamedTuple):
    """One chunk. The logits are overwritten by the next one's."""

    chunk: Chunk
    counted: Tensor | None  # bool [c]: False where the response was exhausted before; None: all count
    hidden: Tensor  # the student's, [c, H]
    student_logits: Tensor
    teacher_logits: Tensor | None
    scored: Scored


def positions_of(problem: Problem) -> Positions:
    """Those that are valid and, if exhausted responses are skipped, not exhausted by the count they come with."""
    hidden, mask = problem.student.hidden, problem.mask
    positions = Positions(hidden.shape[:-1], mask, problem.cu_seqlens, hidden.device)
    if not problem.skip_exhausted or problem.drift_count is None:
        return positions
    alive = ~is_exhausted(problem.drift_count, problem)
    if problem.cu_seqlens is None:
        alive = alive[:, None].expand(positions.shape)
    else:
        lengths = problem.cu_seqlens.diff().to(torch.int64)
        alive = alive.repeat_interleave(lengths, output_size=positions.count_of_all)
    mask = alive if mask is None else alive & (mask != 0)
    return Positions(positions.shape, mask, problem.cu_seqlens, hidden.device)


def is_exhausted(drift_count: Tensor, problem: Problem) -> Tensor:
    """Whether R (eq. 9) is 0 after so many drifts."""
    w_drop: float = problem.arguments["w_drop"]
    return 1.0 - w_drop * drift_count.to(torch.float64) <= 0.0


def computed_chunks(problem: Problem, positions: Positions) -> Iterator[Computed]:
    """One after another, in time order along each response, since a position's weight depends on those before it.

    With `skip_exhausted` it is asked after each chunk whether the response at its end is exhausted, and if so the
    next chunk starts with the next response. On a GPU that waits for the chunk.
    """
    size, arguments, leading = problem.chunk_size, problem.arguments, problem.leading
    student = Logits(problem.student, size, len(positions), leading)
    teacher = Logits(problem.teacher, size, len(positions), leading) if isinstance(problem.teacher, Side) else None
    carry = problem.drift_count
    start = 0
    while start < len(positions):
        chunk = positions.chunk(start, size)
        token_ids = None if problem.token_ids is None else take(problem.token_ids, chunk.places, leading)
        along = {"token_ids": token_ids, "cu_seqlens": chunk.cu_seqlens, "drift_count": carry}
        hidden, student_logits = student.of(chunk.places)
        teacher_logits = None
        if isinstance(problem.teacher, Candidates):
            ids, logprobs = (take(tensor, chunk.places, leading) for tensor in problem.teacher)
            scored = score_candidates(student_logits, ids, logprobs, arguments, **along)
        else:
            assert teacher is not None
            _, teacher_logits = teacher.of(chunk.places)
            scored = Scored(score_logits(student_logits, teacher_logits, arguments, **along))
            if problem.loss is not None:
                scored = terms_of(problem.loss, student_logits, teacher_logits, scored.reliability, arguments)
        drift_count, drift = scored.reliability.drift_count, scored.reliability.drift
        carry = next_drift_count(drift_count, chunk.cu_seqlens, carry)
        start, counted = chunk.stop, None
        if problem.skip_exhausted:
            counted = ~is_exhausted(drift_count - drift.to(torch.int32), problem)
            if bool(is_exhausted(drift_count[-1], problem)):
                start = positions.end_of_response(start - 1)
        yield Computed(chunk, counted, hidden, student_logits, teacher_logits, scored)


class Fields:
    """The results of all positions: what a masked position has, until a chunk's are put in their places."""

    def __init__(self, problem: Problem, positions: Positions) -> None:
        self.problem, self.positions = problem, positions
        k = problem.arguments["k"]
        new, shape, dtype = problem.student.hidden.new_zeros, positions.shape, problem.dtype
        self.candidates = torch.arange(k, device=problem.student.hidden.device)
        self.counted = new(shape, dtype=torch.bool)
        self.overlap = new(shape, dtype=torch.float32)
        self.drift = new(shape, dtype=torch.bool)
        self.topk_ids = self.candidates.repeat(*shape, 1)
        self.rewards = new((*shape, k), dtype=dtype)
        self.entropy = new(shape, dtype=dtype)
        self.loss = new(shape, dtype=dtype)

    def put(self, computed: Computed) -> None:
        scored, counted = computed.scored, computed.counted
        values = {
            "overlap": scored.reliability.overlap,
            "drift": scored.reliability.drift,
            "topk_ids": scored.reliability.topk_ids,
            "rewards": scored.reliability.rewards,  # 0 where exhausted, as the loss is
            "entropy": scored.entropy,
            "loss": None if scored.terms is None else scored.terms.loss,
        }
        index, leading = computed.chunk.places, self.problem.leading
        put(self.counted, index, torch.ones_like(scored.reliability.drift) if counted is None else counted, leading)
        for name, value in values.items():
            if value is None:
                continue
            if counted is not None and name in ("overlap", "drift", "entropy"):
                value = torch.where(counted, value, torch.zeros_like(value))
            if counted is not None and name == "topk_ids":
                value = torch.where(counted[:, None], value, self.candidates)
            put(getattr(self, name), index, value, leading)

    def reliability(self) -> Reliability:
        """With C, R, L and E from one scan over all positions, which is the chunks' own."""
        problem, arguments = self.problem, self.problem.arguments
        along = reliability_from_drift(
            self.drift, self.counted, cu_seqlens=problem.cu_seqlens, drift_count=problem.drift_count,
            **{name: arguments[name] for name in ("w_drop", "w_base", "eps", "impl")},
        )  # fmt: skip
        count, reliability, weight, length = along
        return Reliability(self.overlap, self.drift, count, reliability, weight, length, self.topk_ids, self.rewards)
