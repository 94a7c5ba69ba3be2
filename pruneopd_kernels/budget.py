"""The length up to which responses are sampled, grown and shrunk by how long they stay reliable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from . import checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = "ResponseBudget"


@dataclass
class ResponseBudget:
    """The response budget M of Prune-OPD (arXiv:2605.07804), Algorithm 1, lines 12-19.

    Each `update` takes the effective lengths E of a batch and applies one step. With
    h = (number of E >= M - margin) / (number of responses)

        h >= hit_ratio:  M = min(M + step, maximum), and the counter returns to 0
        else:            the counter grows; at `patience`  M = max(M - step, minimum), and it returns to 0

    Args:
        initial: M at the start, in tokens, between minimum and maximum. The paper has 2048 in section 4.1, and 1024 or
            6144 in A.9.
        minimum: M never falls below this, >= 1.
        maximum: M never exceeds this, >= minimum.
        step: By how many tokens M changes, >= 1.
        margin: How many tokens short of M a response may stay reliable and still count as having used M, >= 0.
        hit_ratio: The share of such responses from which M grows, in (0, 1].
        patience: After how many batches without growth M shrinks, >= 1.
        floor_hit_boundary: Compare E with `max(minimum, M - margin)`, as the authors' code does.
        group: A `torch.distributed` group whose ranks share one budget: their counts are summed, so every rank calls
            `update` each time, with its own part of the batch (which may be empty), and all hold the same M.
            `torch.distributed.group.WORLD` is that of all ranks. None: this process alone.

    Attributes:
        length: M, in tokens.
        counter: Batches without growth since M last changed or could have grown.

    Raises:
        ValueError: A value is outside of its range.
        TypeError: A value is of another type.

    Examples:
        >>> from pruneopd_kernels import ResponseBudget
        >>> budget = ResponseBudget(initial=2048, patience=2)
        >>> budget.update([2048, 1990, 700])  # two of three reach 2048 - 100
        2148
        >>> [budget.update([300, 400, 500]) for _ in range(4)]
        [2148, 2048, 2048, 1948]
    """

    initial: int = 2048
    minimum: int = 1024
    maximum: int = 12288
    step: int = 100
    margin: int = 100
    hit_ratio: float = 0.1
    patience: int = 3
    floor_hit_boundary: bool = False
    group: ProcessGroup | None = None
    length: int = field(init=False)
    counter: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        for name in ("initial", "minimum", "maximum", "step", "margin", "patience"):
            checks.kind(_NAME, name, getattr(self, name), "int")
            setattr(self, name, int(getattr(self, name)))  # a NumPy scalar would end up in `state_dict`
        checks.kind(_NAME, "hit_ratio", self.hit_ratio, "float")
        checks.kind(_NAME, "floor_hit_boundary", self.floor_hit_boundary, "bool")
        checks.at_least(_NAME, "minimum", self.minimum, 1)
        checks.at_least(_NAME, "maximum", self.maximum, self.minimum, "minimum = ")
        self._check_length("initial", self.initial)
        checks.at_least(_NAME, "step", self.step, 1)
        checks.at_least(_NAME, "margin", self.margin, 0)
        checks.number(_NAME, "hit_ratio", self.hit_ratio, "be in (0, 1]")
        checks.at_least(_NAME, "patience", self.patience, 1)
        if self.group is not None:
            from torch.distributed import ProcessGroup

            if not isinstance(self.group, ProcessGroup):
                checks.bad_type(_NAME, "group", "be a torch.distributed group or None", type(self.group).__name__)
        self.length = self.initial

    def update(self, effective_lengths: Any) -> int:
        """Apply one step and return the new M; an empty batch changes nothing.

        Args:
            effective_lengths: E of each response, a tensor on any device, a NumPy array or a sequence of numbers. On a
                GPU this waits for it.

        Raises:
            TypeError: It is none of these.
        """
        boundary = self.length - self.margin
        if self.floor_hit_boundary:
            boundary = max(self.minimum, boundary)
        hits, total = _count(effective_lengths, boundary)
        if self.group is not None:
            hits, total = _sum_over_ranks(hits, total, self.group)
        if total == 0:
            return self.length
        if hits / total >= self.hit_ratio:
            self.length, self.counter = min(self.length + self.step, self.maximum), 0
        else:
            self.counter += 1
            if self.counter >= self.patience:
                self.length, self.counter = max(self.length - self.step, self.minimum), 0
        return self.length

    def state_dict(self) -> dict[str, int]:
        """Return what changes from step to step: `length` and `counter`."""
        return {"length": self.length, "counter": self.counter}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: A key is missing or unknown, or a value does not fit this budget's settings.
            TypeError: A value is not an int.
        """
        if not isinstance(state, Mapping):
            checks.bad_type(_NAME, "state", "be a mapping", type(state).__name__)
        if set(state) != {"length", "counter"}:
            checks.bad_value(_NAME, "state", "have the keys ['counter', 'length']", sorted(map(str, state)))
        for key in ("length", "counter"):
            checks.kind(_NAME, key, state[key], "int")
        self._check_length("length", state["length"])
        checks.between(_NAME, "counter", state["counter"], 0, self.patience - 1)
        self.length, self.counter = int(state["length"]), int(state["counter"])

    def _check_length(self, argument: str, length: int) -> None:
        if not self.minimum <= length <= self.maximum:
            rule = f"be between minimum = {self.minimum} and maximum = {self.maximum}"
            checks.bad_value(_NAME, argument, rule, length)


def _count(effective_lengths: Any, boundary: int) -> tuple[int, int]:
    """Return how many lengths reach the boundary, and how many there are."""
    argument = "effective_lengths"
    if hasattr(effective_lengths, "shape"):
        checks.plain(_NAME, argument, effective_lengths)
        checks.has_dtype(_NAME, argument, effective_lengths, (*checks.INTEGERS, *checks.FLOATS), "integer or float")
        return int((effective_lengths >= boundary).sum()), math.prod(effective_lengths.shape)
    if not isinstance(effective_lengths, Sequence) or isinstance(effective_lengths, (str, bytes)):
        rule = "be a tensor, an array or a sequence of lengths"
        checks.bad_type(_NAME, argument, rule, type(effective_lengths).__name__)
    for length in effective_lengths:
        if not isinstance(length, Real) and getattr(length, "ndim", 1) != 0:
            checks.bad_type(_NAME, argument, "hold numbers", type(length).__name__)
    return sum(bool(length >= boundary) for length in effective_lengths), len(effective_lengths)


def _sum_over_ranks(hits: int, total: int, group: ProcessGroup) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    on_cpu = any(name in dist.get_backend(group) for name in ("gloo", "mpi"))
    counts = torch.tensor([hits, total], device="cpu" if on_cpu else torch.accelerator.current_accelerator())
    dist.all_reduce(counts, group=group)
    return tuple(counts.tolist())
