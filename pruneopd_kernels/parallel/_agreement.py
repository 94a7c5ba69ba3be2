"""The first exchange: whether the ranks were called alike, and which ids each of them holds.

A rank that its own arguments keep from going on takes part all the same, or the others would wait for it. So a call
raises on every rank or on none.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from .. import checks
from ..dispatch import implementations
from ..errors import InvalidType, InvalidValue
from ..formulas import has_values, is_set
from ..ops import Operator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Stands for the width of the whole vocabulary while only one slice of it is known: no argument exceeds it.
UNKNOWN_WIDTH = 2**62
# Whose values the checks look at, on the CPU.
VALUES = ("mask", "token_ids", "topk_ids", "teacher_topk_ids", "cu_seqlens", "drift_count")


@dataclass(frozen=True)
class Slices:
    """Which ids each rank holds, and which rank this is. Only ids below vocab_size exist."""

    group: ProcessGroup | None
    rank: int
    ends: tuple[int, ...]  # of each rank's ids
    vocab_size: int
    impl: Any  # what computes on this rank

    @property
    def offset(self) -> int:
        return self.ends[self.rank - 1] if self.rank else 0

    @property
    def widths(self) -> list[int]:
        return [end - begin for begin, end in zip((0, *self.ends), self.ends, strict=False)]

    @property
    def width(self) -> int:
        """Return how many ids this rank holds."""
        return self.ends[self.rank] - self.offset

    def counts(self, k: int) -> list[int]:
        """Return how many candidates each rank has."""
        return [min(k, width) for width in self.widths]


class _Entry(NamedTuple):
    """One thing that must be equal on every rank."""

    argument: str
    words: str
    is_dtype: bool = False


def agree(op: Operator, group: ProcessGroup | None, a: Any, impl: str) -> Slices:
    """Check a record of arguments on all ranks at once, with one small exchange."""
    rank, ranks = _place(op.name, group)
    error = _error(op, a, impl, None)
    entries = _entries(op, a, impl) if error is None else []
    digest = hashlib.blake2b(repr(entries).encode(), digest_size=8).digest()
    names = logits_of(op)
    mine = [_width(getattr(a, name)) for name in (names[0], names[-1])]
    rows = _exchange([int.from_bytes(digest, "little", signed=True), *mine, error is not None], ranks, group)
    digests, *widths, failures = zip(*rows, strict=True)
    whole = dict(zip((names[0], names[-1]), map(sum, widths), strict=True))
    if any(failures) or len(set(digests)) > 1:
        _raise_together(op.name, error and (_error(op, a, impl, whole) or error), entries, ranks, group)
    error = _error(op, a, impl, whole)  # of what has been agreed on, and so the same on every rank
    if error is not None:
        raise error
    vocab_size = whole[names[0]] if a.vocab_size is None else int(a.vocab_size)
    ends, teacher_ends = (_ends(of_ranks, vocab_size) for of_ranks in widths)
    _cut_alike(op.name, ends, teacher_ends)
    return Slices(group, rank, ends, vocab_size, implementations.choose(op.name, impl, a[0].device))


def logits_of(op: Operator) -> list[str]:
    """Return the names of the arguments of which each rank has a slice."""
    return [name for name in op.tensors if name.endswith("logits")]


def _place(op: str, group: ProcessGroup | None) -> tuple[int, int]:
    """This rank and how many there are."""
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        checks.bad_type(op, "group", "be a torch.distributed group or None", type(group).__name__)
    rank = dist.get_rank(group)
    if rank < 0:
        checks.bad_value(op, "group", "contain this rank", "one without it")
    return rank, dist.get_world_size(group)


def _exchange(numbers: list[int], ranks: int, group: ProcessGroup | None) -> list[list[int]]:
    """The int64 numbers of every rank; on the CPU where the group can, for reading them from a GPU waits for it."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    mine = torch.tensor(numbers, device="cpu" if on_cpu else torch.accelerator.current_accelerator())
    everyone = mine.new_empty((ranks, len(numbers)))
    dist.all_gather(list(everyone.unbind()), mine, group=group)
    return everyone.tolist()


def _width(logits: Any) -> int:
    return logits.shape[-1] if isinstance(logits, Tensor) and not logits.is_nested and logits.ndim else 0


def _ends(widths: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    return tuple(min(end, vocab_size) for end in accumulate(widths))


def _cut_alike(op: str, student_ends: tuple[int, ...], teacher_ends: tuple[int, ...]) -> None:
    for rank, (student, teacher) in enumerate(zip(student_ends, teacher_ends, strict=True)):
        if student != teacher:
            rule = f"be cut like student_logits: on rank {rank}, ids end at {student}"
            checks.bad_value(op, "teacher_logits", rule, teacher)


# What a rank finds wrong by itself.


class _Whole:
    """Logits as the checks see them, with the width of the whole vocabulary."""

    def __init__(self, logits: Tensor, width: int) -> None:
        self.shape = (*logits.shape[:-1], width)
        self.ndim, self.dtype, self.device = logits.ndim, logits.dtype, logits.device
        self._stride = logits.stride(-1) if logits.shape[-1] > 1 and logits.numel() else 1

    def stride(self, axis: int) -> int:
        return self._stride


def _error(op: Operator, a: Any, impl: str, widths: Mapping[str, int] | None) -> Exception | None:
    """Return what is wrong with this rank's arguments; without the widths of all, what does not depend on them."""
    try:
        op.check_kinds(a, Tensor, "a tensor")
        op.check_plain(a)
        checks.kind(op.name, "impl", impl, "str")
        sliced = {name: getattr(a, name) for name in logits_of(op) if getattr(a, name).ndim}
        whole = {name: _Whole(x, UNKNOWN_WIDTH if widths is None else widths[name]) for name, x in sliced.items()}
        chosen = implementations.choose(op.name, impl, a[0].device)
        op.check(a._replace(**whole), float64=chosen == "reference", values=has_values(a[0]))
        implementations.require_usable(op.name, chosen, a[0].device)
    except Exception as error:  # whatever it is, the others must hear of it
        return error
    return None


# What the ranks find wrong together.


def _entries(op: Operator, a: Any, impl: str) -> list[_Entry]:
    """Return all that must be equal on every rank, in words."""
    entries = [_Entry("the operator", op.name)]
    for name, value in {**a._asdict(), "impl": impl}.items():
        if not isinstance(value, Tensor):
            entries.append(_Entry(name, _scalar(value, op.kinds.get(name, "str"))))
            continue
        shape = [*value.shape[:-1], "V"] if name in logits_of(op) else value.shape
        entries.append(_Entry(name, str(value.dtype).removeprefix("torch."), is_dtype=True))
        entries.append(_Entry(name, f"[{', '.join(map(str, shape))}] on {value.device.type}"))
        if name in VALUES and has_values(value):
            entries.append(_Entry(name, f"values of checksum {_checksum(name, value, a.mask):08x}"))
    return entries


def _scalar(value: Any, kind: str) -> str:
    return repr(float(value)) if kind.startswith("float") and hasattr(value, "__float__") else repr(value)


def _checksum(name: str, values: Tensor, mask: Tensor | None) -> int:
    if name == "mask":
        values = is_set(values)
    elif name.endswith("_ids") and mask is not None:  # what is masked may be anything
        valid = is_set(mask).reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
        values = torch.where(valid, values, 0)
    return zlib.crc32(values.contiguous().numpy().tobytes())


def _raise_together(
    op: str, error: Exception | None, entries: list[_Entry], ranks: int, group: ProcessGroup | None
) -> NoReturn:
    """A second exchange, of words: every rank raises, for the first rank that found something or for a difference."""
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, (None if error is None else _spoken(op, error), entries), group=group)
    if error is not None:
        raise error
    for rank, (found, _) in enumerate(everyone):
        if found is not None:
            kind, words = found
            raise kind(f"{op}: rank {rank}: {words}")
    for column in zip(*(entries for _, entries in everyone), strict=False):
        words = [entry.words for entry in column]
        if len(set(words)) > 1:
            raise_ = checks.bad_type if all(entry.is_dtype for entry in column) else checks.bad_value
            raise_(op, column[0].argument, "be equal on every rank", _by_rank(words))
    raise AssertionError(f"{op}: the ranks' digests differ and their arguments do not")


def _spoken(op: str, error: Exception) -> tuple[type[Exception], str]:
    """An error as others raise it."""
    kinds: tuple[type[Exception], ...] = (InvalidValue, InvalidType)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind, str(error).removeprefix(f"{op}: ")


def _by_rank(words: list[str]) -> str:
    """Each value with the first rank that has it."""
    return ", ".join(f"{value} (rank {words.index(value)})" for value in dict.fromkeys(words))
