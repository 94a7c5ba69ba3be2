"""Where a position's rows and its program's working memory lie, and the launches that the logits operators share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import device_of, flags, float32, float64_bits
from .order import KEY_SHIFT
from .row_pass import BLOCK, FIELDS, NUM_WARPS, SEGMENT, TILE, TILES, sum_segment
from .selection import list_size
from .summary import float64

# Arguments of which nothing is gained by compiling for a 1 or a multiple of 16.
DO_NOT_SPECIALIZE = ["positions", "words", "segments", "x_scale", "y_scale"]
DO_NOT_SPECIALIZE += ["x_temperature", "y_temperature"]


@triton.jit
def row_at(logits, n, inner, outer_stride, inner_stride, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The row of position n; with ALIGNED its address is known to allow loads of 16 bytes."""
    offset = n // inner * outer_stride + n % inner * inner_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return logits + offset


@triton.jit
def is_valid(mask, n):
    if mask is None:
        return True
    else:
        return tl.load(mask + n) != 0


@triton.constexpr_function
def span_of(pass_):
    """Positions that a program looks at together: for needs_exact ones, whether there are any."""
    return 32 if pass_ == "exact" else 1


@triton.jit
def end_of_span(needs_exact, first, positions, SPAN: tl.constexpr):
    """Where the positions of a span end; where it begins if there is nothing to do in it."""
    if SPAN == 1:
        return first + 1
    else:
        n = first + tl.arange(0, SPAN)
        some = tl.max(tl.load(needs_exact + n, mask=n < positions, other=0).to(tl.int32), 0)
        return tl.where(some > 0, tl.minimum(first + SPAN, positions), first)


@triton.jit
def is_due(mask, needs_exact, n, PASS: tl.constexpr):
    """Whether the rows of a position are to be read: it is valid, or on the exact way needs_exact."""
    if PASS == "exact":
        return tl.load(needs_exact + n) != 0
    else:
        return is_valid(mask, n)


@triton.constexpr_function
def type_of_maxima(x_type, y_type):
    return x_type if y_type is None or x_type == y_type else tl.pointer_type(tl.float32)


@triton.jit
def memory_of(scratch, slot, words, x_logits, y_logits, LISTS: tl.constexpr, SEGMENTS: tl.constexpr,
              K_PADDED: tl.constexpr):  # fmt: skip
    """A program's working memory: both candidate lists (int64), lists (int32), records (float32), tile maxima.

    The maxima of both rows' tiles take turns, as logits where they have one type, else as float32; without y_logits
    every second place stays empty. Without candidates there is memory for the records alone.
    """
    x_candidates = scratch + slot.to(tl.int64) * words
    y_candidates = x_candidates + K_PADDED
    lists = (y_candidates + K_PADDED).to(tl.pointer_type(tl.int32), bitcast=True)
    records = (lists + LISTS).to(tl.pointer_type(tl.float32), bitcast=True)
    logits: tl.constexpr = type_of_maxima(x_logits.dtype, None if y_logits is None else y_logits.dtype)
    maxima = (records + 2 * FIELDS * SEGMENTS).to(logits, bitcast=True)
    return x_candidates, y_candidates, lists, records, maxima


@triton.jit(do_not_specialize=["words", "segments", "x_scale", "y_scale"])
def segments_kernel(x_logits, y_logits, mask, scratch, words, x_inner, x_outer_stride, x_inner_stride, y_inner,
                    y_outer_stride, y_inner_stride, vocab_size, segments, x_scale, y_scale,
                    VEC: tl.constexpr, ALIGNED: tl.constexpr, STATS: tl.constexpr, LISTS: tl.constexpr,
                    SEGMENTS: tl.constexpr, K_PADDED: tl.constexpr):  # fmt: skip
    """One segment of one position a program: where there are few positions."""
    x_scale, y_scale = float64(x_scale).to(tl.float32), float64(y_scale).to(tl.float32)
    n = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    if is_valid(mask, n):
        x_row = row_at(x_logits, n, x_inner, x_outer_stride, x_inner_stride, VEC, ALIGNED)
        y_row = row_at(y_logits, n, y_inner, y_outer_stride, y_inner_stride, VEC, ALIGNED)
        _, _, _, records, maxima = memory_of(scratch, n, words, x_logits, y_logits, LISTS, SEGMENTS, K_PADDED)
        maxima = maxima if K_PADDED > 0 else None
        sum_segment(x_row, y_row, maxima, records, segment, vocab_size, x_scale, y_scale, SEGMENTS, VEC, STATS)


@triton.jit(do_not_specialize=["words", "segments", "scale"])
def segments_of_one_kernel(logits, mask, scratch, words, inner, outer_stride, inner_stride, vocab_size, segments, scale,
                           VEC: tl.constexpr, ALIGNED: tl.constexpr, LISTS: tl.constexpr, SEGMENTS: tl.constexpr,
                           K_PADDED: tl.constexpr):  # fmt: skip
    """The same for a row that is alone."""
    scale = float64(scale).to(tl.float32)
    n = (tl.program_id(0) // segments).to(tl.int64)
    if is_valid(mask, n):
        row = row_at(logits, n, inner, outer_stride, inner_stride, VEC, ALIGNED)
        _, _, _, records, maxima = memory_of(scratch, n, words, logits, None, LISTS, SEGMENTS, K_PADDED)
        segment = tl.program_id(0) % segments
        maxima = maxima if K_PADDED > 0 else None
        sum_segment(row, None, maxima, records, segment, vocab_size, scale, scale, SEGMENTS, VEC, 0)


class Launch:
    """The launches of a kernel over logits, one or a pair: what it takes of them, its working memory, its programs.

    Many positions: as many programs as the device holds walk over them, each with working memory of its own. Few: a
    kernel with a program for each segment of each position comes first, so that all of the device reads.

    `k` is None where nothing is selected; `stats` says which sums are wanted of a pair (row_pass.STATS).
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        temperatures: Sequence[float],
        mask: Tensor | None,
        k: int | None,
        vocab_size: int | None,
        stats: int = 0,
    ) -> None:
        vocab_size = logits[0].shape[-1] if vocab_size is None else vocab_size
        self.logits, self.mask, self.stats = logits, flags(mask), stats
        self.per_processor = programs_per_processor(len(logits), k)
        self.positions = math.prod(logits[0].shape[:-1])
        self.segments = triton.cdiv(vocab_size, SEGMENT.value)
        segments_padded = triton.next_power_of_2(self.segments)
        k_padded = 0 if k is None else triton.next_power_of_2(k)
        lists = 0 if k is None else list_size(k_padded)
        tile_slots = 0 if k is None else triton.cdiv(vocab_size, BLOCK.value) * TILES.value
        bytes_of_memory = 16 * k_padded + 4 * (lists + 2 * FIELDS.value * segments_padded)
        same = len({x.dtype for x in logits}) == 1
        bytes_of_memory += 2 * tile_slots * (logits[0].element_size() if same else 4)
        self.words = bytes_of_memory // 8
        addresses = [number for x in logits for number in positions_of(x)] if self.positions else []
        self.shape = [*addresses, vocab_size, self.segments]
        self.scales = [float64_bits(scale_of(temperature)) for temperature in temperatures]
        self.temperatures = [float64_bits(temperature) for temperature in temperatures]
        self.layout = {
            "VEC": vector_size(logits),
            "ALIGNED": self.positions > 0 and all(is_aligned(x) for x in logits),
            "LISTS": lists,
            "SEGMENTS": segments_padded,
            "K_PADDED": k_padded,
        }
        self.selection: dict[str, int] = {}
        if k is not None:
            tiles_padded = triton.next_power_of_2(triton.cdiv(vocab_size, TILE.value))
            self.selection = {"K": k, "TILES_PADDED": max(k_padded, tiles_padded)}
            shifts = ("X_SHIFT", "Y_SHIFT") if len(logits) == 2 else ("SHIFT",)
            self.selection |= {name: KEY_SHIFT[x.dtype] for name, x in zip(shifts, logits, strict=True)}

    def run(
        self,
        kernel: Any,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        scalars: Sequence[int | None],
        **constants: Any,
    ) -> None:
        if self.positions == 0:
            return
        device = self.logits[0].device
        at_once = self.per_processor * processors(device)
        fused = 2 * self.positions >= at_once
        programs = min(self.positions, at_once) if fused else self.positions
        scratch = torch.empty(programs * self.words, dtype=torch.int64, device=device)
        needs_exact = torch.empty(self.positions, dtype=torch.int8, device=device)
        with device_of(scratch):
            if not fused:
                pair = {"STATS": self.stats} if len(self.logits) == 2 else {}
                (segments_kernel if pair else segments_of_one_kernel)[(self.positions * self.segments,)](
                    *self.logits, self.mask, scratch, self.words, *self.shape, *self.scales,
                    **self.layout, **pair, num_warps=NUM_WARPS,
                )  # fmt: skip
            for pass_ in ("fused" if fused else "merge", "exact"):
                kernel[(programs,)](
                    *self.logits, self.mask, *inputs, scratch, needs_exact, *outputs, self.positions, self.words,
                    *self.shape, *self.scales, *self.temperatures, *scalars,
                    PASS=pass_, **self.layout, **self.selection, **constants, num_warps=NUM_WARPS,
                    **registers(self.per_processor if pass_ == "fused" else 1),
                )  # fmt: skip


def programs_per_processor(rows: int, k: int | None) -> int:
    """How many row passes a multiprocessor is to hold at a time: while one selects, the others read.

    Each is 4 warps with 8 loads of 16 bytes under way, 4 of a row that is alone. Their share of the registers is enough
    for nothing to be spilled, which tests see to.
    """
    if rows == 2:
        return 3 if k is None or k <= 32 else 2
    return 5 if k is None else 4 if k <= 32 else 3


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":  # in Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def scale_of(temperature: float) -> float:
    """What a logit is multiplied by to be in log2 units: a float32."""
    return float32(1 / (math.log(2) * temperature))


def vector_size(logits: Sequence[Tensor]) -> int:
    """How many adjoining elements are loaded at a time: 16 bytes of the widest."""
    return 16 // max(x.element_size() for x in logits)


def registers(programs: int) -> dict[str, int]:
    """The option that limits a thread's registers, so that this many programs fit; AMD's compiler has none."""
    share = 65536 // (32 * NUM_WARPS * programs)
    return {} if torch.version.hip else {"maxnreg": min(share // 8 * 8, 255)}


def position_axes(logits: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the leading axes; axes that can be walked as one are merged."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def positions_of(logits: Tensor) -> tuple[int, int, int]:
    """Position n's row begins at n // inner * outer_stride + n % inner * inner_stride: the numbers of that."""
    axes = position_axes(logits)
    (_, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(axes)) + axes
    return inner, outer_stride, inner_stride


def is_aligned(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    _, *strides = positions_of(logits)
    return all(number % 16 == 0 for number in (logits.data_ptr(), *(n * logits.element_size() for n in strides)))


def for_any_axes(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator, called for each index of the first axis where two strides do not tell where the positions lie."""

    @functools.wraps(op)
    def wrapped(a: Any) -> tuple[Tensor, ...]:
        logits = [x for name, x in a._asdict().items() if name.endswith("_logits")]
        if all(len(position_axes(x)) <= 2 for x in logits) or not logits[0].numel():
            return op(a)
        parts = [wrapped(a._make(x[i] if isinstance(x, Tensor) else x for x in a)) for i in range(logits[0].shape[0])]
        return tuple(torch.stack(field) for field in zip(*parts, strict=True))

    return wrapped
