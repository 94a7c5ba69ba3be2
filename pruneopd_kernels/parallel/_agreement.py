"""The first exchange: whether the ranks were called alike, and which ids each of them holds.

A rank that its own arguments keep from going on takes part all the same, or the others would wait for it. So a call
raises on every rank or on none.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from .. import checks
from ..dispatch import implementations
from ..errors import InvalidType, InvalidValue
from ..formulas import has_values, is_set

# Stands for the width of the whole vocabulary while only one slice of it is known: the largest that int32 ids are
# compared with.
UNKNOWN_WIDTH = 2**31 - 1
# Whose values the checks look at, on the CPU.
VALUES = ("mask", "token_ids", "topk_ids", "teacher_topk_ids", "cu_seqlens", "drift_count")


@dataclass(frozen=True)
class Slices:
    """Which ids each rank holds, and which rank this is. Only ids below vocab_size exist."""

    group: dist.ProcessGroup | None
    rank: int
    ends: tuple[int, ...]  # of each rank's ids
    vocab_size: int
    widest: int  # how many ids, existing or not, any rank has of a model
    impl: Any  # what computes on this rank

    @property
    def offset(self) -> int:
        return self.ends[self.rank - 1] if self.rank else 0

    @property
    def widths(self) -> list[int]:
        return [end - begin for begin, end in zip((0, *self.ends), self.ends, strict=False)]

    @property
    def width(self) -> int:
        return self.ends[self.rank] - self.offset

    def counts(self, k: int) -> list[int]:
        """Return how many candidates each rank has."""
        return [min(k, width) for width in self.widths]


class _Entry(NamedTuple):
    """One thing that must be equal on every rank."""

    argument: str
    words: str
    is_dtype: bool = False


def agree(op: Any, group: dist.ProcessGroup | None, a: Any, impl: str) -> Slices:
    """Check a record of arguments on all ranks at once, with one small exchange.

    `op` is an operator or the declaration of a function from hidden states.
    """
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        checks.bad_type(op.name, "group", "be a torch.distributed group or None", type(group).__name__)
    rank = dist.get_rank(group)
    if rank < 0:
        checks.bad_value(op.name, "group", "contain this rank", "one without it")
    ranks = dist.get_world_size(group)
    error = _error(op, a, impl, None)
    entries = _entries(op, a, impl) if error is None else []
    digest = hashlib.blake2b(repr(entries).encode(), digest_size=8).digest()
    mine = [int.from_bytes(digest, "little", signed=True), *_widths(op, a), error is not None]
    digests, *widths, failures = zip(*_exchange(mine, ranks, group), strict=True)
    whole = [sum(of_ranks) for of_ranks in widths]
    if any(failures) or len(set(digests)) > 1:
        _raise_together(op.name, error and (_error(op, a, impl, whole) or error), entries, ranks, group)
    error = _error(op, a, impl, whole)  # of what has been agreed on, and so the same on every rank
    if error is not None:
        raise error
    vocab_size = whole[0] if a.vocab_size is None else int(a.vocab_size)
    ends, of_teacher = (tuple(min(end, vocab_size) for end in accumulate(of_ranks)) for of_ranks in widths)
    for cut, (end, other) in enumerate(zip(ends, of_teacher, strict=True)):
        if end != other:
            student_slice, teacher_slice = _models(op)
            rule = f"be cut like {student_slice}: on rank {cut}, ids end at {end}"
            checks.bad_value(op.name, teacher_slice, rule, other)
    widest = max(max(of_ranks) for of_ranks in widths)
    return Slices(group, rank, ends, vocab_size, widest, implementations.choose(op.name, impl, a[0].device))


def axes_of(op: Any) -> dict[str, int]:
    """Return the arguments of which each rank has a slice, logits or heads, and which axis is the vocabulary's."""
    heads = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
    axes = {name: -1 for name in op.tensors if name.endswith("logits")}
    return axes or {name: 0 for name in heads if name in op.tensors}


def _models(op: Any) -> tuple[str, str]:
    """Return the slices that tell how each model's vocabulary is cut; of one model, the same twice."""
    names = [name for name in axes_of(op) if not name.endswith("bias")]
    return names[0], names[-1]


def _widths(op: Any, a: Any) -> list[int]:
    """Return how many ids this rank has of each model; of the first one if there is no second."""
    first, last = (getattr(a, name) for name in _models(op))
    axis, both = next(iter(axes_of(op).values())), (first, first if last is None else last)
    return [x.shape[axis] if isinstance(x, Tensor) and not x.is_nested and x.ndim else 0 for x in both]


def _exchange(numbers: list[int], ranks: int, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Return every rank's int64 numbers; on the CPU if the group can, because reading them from a GPU waits for it."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    mine = torch.tensor(numbers, device="cpu" if on_cpu else torch.accelerator.current_accelerator())
    everyone = mine.new_empty((ranks, len(numbers)))
    dist.all_gather(list(everyone.unbind()), mine, group=group)
    return everyone.tolist()


# What a rank finds wrong by itself.


class _Whole:
    """A slice as the checks see it, with the ids of the others beside its own."""

    def __init__(self, x: Tensor, axis: int, others: int) -> None:
        shape = [*x.shape]
        shape[axis] += others
        self.shape = tuple(shape)
        self.ndim, self.dtype, self.device = x.ndim, x.dtype, x.device
        self._stride = x.stride(-1) if x.shape[-1] > 1 and x.numel() else 1

    def stride(self, axis: int) -> int:
        return self._stride


def _error(op: Any, a: Any, impl: str, whole: Sequence[int] | None) -> Exception | None:
    """Return what is wrong with this rank's arguments; without the whole widths, what does not depend on them."""
    try:
        op.check_kinds(a, Tensor, "a tensor")
        for name in op.tensors:
            if getattr(a, name) is not None:
                checks.plain(op.name, name, getattr(a, name))
        checks.kind(op.name, "impl", impl, "str")
        mine = _widths(op, a)
        others = [width - own for width, own in zip(whole or (UNKNOWN_WIDTH, UNKNOWN_WIDTH), mine, strict=True)]
        sliced = {name: (getattr(a, name), axis) for name, axis in axes_of(op).items()}
        wholes = {
            name: _Whole(x, axis, others[name.startswith("teacher")])
            for name, (x, axis) in sliced.items()
            if x is not None and x.ndim
        }
        chosen = implementations.choose(op.name, impl, a[0].device)
        op.check(a._replace(**wholes), float64=chosen == "reference", values=has_values(a[0]))
        implementations.require_usable(op.name, chosen, a[0].device)
    except Exception as error:  # whatever it is, the others must hear of it
        return error
    return None


# What the ranks find wrong together.


def _entries(op: Any, a: Any, impl: str) -> list[_Entry]:
    """Return all that must be equal on every rank, in words."""
    entries, axes = [_Entry("the operator", op.name)], axes_of(op)
    for name, value in {**a._asdict(), "impl": impl}.items():
        if not isinstance(value, Tensor):
            is_float = op.kinds.get(name, "str").startswith("float") and hasattr(value, "__float__")
            entries.append(_Entry(name, repr(float(value) if is_float else value)))
            continue
        shape = [*map(str, value.shape)]
        if name in axes:
            shape[axes[name]] = "V"
        # A gradient by whole hidden states is summed over all ranks.
        wants = name == "student_hidden" and value.requires_grad and torch.is_grad_enabled()
        entries.append(_Entry(name, str(value.dtype).removeprefix("torch."), is_dtype=True))
        words = f"[{', '.join(shape)}] on {value.device.type}"
        entries.append(_Entry(name, words + (", wanting a gradient" if wants else "")))
        if name in VALUES and has_values(value):
            entries.append(_Entry(name, f"values of checksum {_checksum(name, value, a.mask):08x}"))
    return entries


def _checksum(name: str, values: Tensor, mask: Tensor | None) -> int:
    if name == "mask":
        values = is_set(values)
    elif name.endswith("_ids") and mask is not None:  # what is masked may be anything
        valid = is_set(mask).reshape([*mask.shape, *[1] * (values.ndim - mask.ndim)])
        values = torch.where(valid, values, 0)
    return zlib.crc32(values.contiguous().numpy().tobytes())


def _raise_together(
    op: str, error: Exception | None, entries: list[_Entry], ranks: int, group: dist.ProcessGroup | None
) -> NoReturn:
    """Exchange words: every rank raises, for the first rank that found something or for a difference."""
    spoken = None if error is None else str(error).removeprefix(f"{op}: ")
    kind = next((kind for kind in (InvalidValue, InvalidType) if isinstance(error, kind)), RuntimeError)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, (spoken, kind, entries), group=group)
    if error is not None:
        raise error
    for rank, (found, kind, _) in enumerate(everyone):
        if found is not None:
            raise kind(f"{op}: rank {rank}: {found}")
    for column in zip(*(entries for *_, entries in everyone), strict=False):
        words = [entry.words for entry in column]
        if len(set(words)) > 1:
            raise_ = checks.bad_type if all(entry.is_dtype for entry in column) else checks.bad_value
            first = ", ".join(f"{value} (rank {words.index(value)})" for value in dict.fromkeys(words))
            raise_(op, column[0].argument, "be equal on every rank", first)
    raise AssertionError(f"{op}: the ranks' digests differ and their arguments do not")
