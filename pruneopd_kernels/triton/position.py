"""The kernel that walks over positions, and its launch. An operator says what happens at one position."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import flags, float64_bits, per_position
from .row_pass import BLOCK, FIELDS, NUM_WARPS, SEGMENT, TILE, TILES, sum_segment
from .selection import list_size, select
from .summary import float64_pair, summarize, summarize_exactly


@triton.jit
def row_at(rows, n, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the row of position n. ALIGNED: its address allows loads of 16 bytes."""
    logits, inner, outer_stride, inner_stride = rows
    offset = n // inner * outer_stride + n % inner * inner_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return logits + offset


@triton.jit
def is_due(mask, needs_exact, n, PASS: tl.constexpr):
    """Return whether the pass computes a position: the exact pass those that need it, the others all valid ones."""
    if PASS == "exact":
        return tl.load(needs_exact + n) != 0
    elif mask is None:
        return True
    else:
        return tl.load(mask + n) != 0


@triton.jit
def end_of_span(needs_exact, first, positions, SPAN: tl.constexpr):
    """Return where the positions of a span end, or where it begins if it has nothing to compute."""
    if SPAN == 1:
        return first + 1
    else:
        n = first + tl.arange(0, SPAN)
        some = tl.max(tl.load(needs_exact + n, mask=n < positions, other=0).to(tl.int32), 0)
        return tl.where(some > 0, tl.minimum(first + SPAN, positions), first)


@triton.constexpr_function
def type_of_maxima(x_type, y_type):
    """Return the type of the tile maxima: the logits' own, float32 if they differ."""
    return x_type if x_type == y_type else tl.pointer_type(tl.float32)


@triton.jit
def memory_of(scratch, slot, words, x, y, K_PADDED: tl.constexpr, SEGMENTS: tl.constexpr):
    """Return a program's working memory: both candidate lists (int64), lists (int32), records (float32), tile maxima.

    The maxima of both rows' tiles alternate. Without a second row every other place stays empty. If K_PADDED is 0,
    nothing is selected and only the records have memory.
    """
    x_candidates = scratch + slot.to(tl.int64) * words
    y_candidates = x_candidates + K_PADDED
    lists = (y_candidates + K_PADDED).to(tl.pointer_type(tl.int32), bitcast=True)
    records = (lists + list_size(K_PADDED)).to(tl.pointer_type(tl.float32), bitcast=True)
    logits: tl.constexpr = type_of_maxima(x[0].dtype, x[0].dtype if y is None else y[0].dtype)
    maxima = (records + 2 * FIELDS * SEGMENTS).to(logits, bitcast=True)
    return (x_candidates, y_candidates), lists, records, maxima


@triton.jit
def store_masked(outputs, n, WIDTHS: tl.constexpr):
    """Store the results of a position that is masked out: 0 .. k-1 as ids, 0 as everything else."""
    for i in tl.static_range(len(outputs)):
        j = tl.arange(0, triton.next_power_of_2(WIDTHS[i]))
        values = j if outputs[i].dtype.element_ty == tl.int64 else tl.zeros(j.shape, tl.float32)
        tl.store(outputs[i] + n * WIDTHS[i] + j, values, mask=j < WIDTHS[i])


@triton.jit(do_not_specialize=["words", "segments", "scales"])
def segments_kernel(x, y, mask, scratch, words, vocab_size, segments, scales, VEC: tl.constexpr, ALIGNED: tl.constexpr,
                    STATS: tl.constexpr, SEGMENTS: tl.constexpr, K_PADDED: tl.constexpr):  # fmt: skip
    """Sum one segment of one position in each program, so that few positions keep all of the device reading."""
    n = (tl.program_id(0) // segments).to(tl.int64)
    if is_due(mask, None, n, "merge"):
        _, _, records, maxima = memory_of(scratch, n, words, x, y, K_PADDED, SEGMENTS)
        x_row, y_row = row_at(x, n, VEC, ALIGNED), None if y is None else row_at(y, n, VEC, ALIGNED)
        sum_segment(x_row, y_row, maxima if K_PADDED > 0 else None, records, tl.program_id(0) % segments, vocab_size,
                    float64_pair(scales), SEGMENTS, VEC, STATS)  # fmt: skip


# Compiling for a 1 or a multiple of 16 gains nothing for these arguments.
@triton.jit(do_not_specialize=["positions", "words", "segments", "scales", "temperatures", "scalars"],
            repr=lambda kernel: f"{kernel.constants['COMPUTE'].__name__}_kernel")  # fmt: skip
def positions_kernel(x, y, mask, inputs, outputs, scalars, scratch, needs_exact, positions, words, vocab_size, segments,
                     scales, temperatures, COMPUTE: tl.constexpr, OPTION: tl.constexpr, WIDTHS: tl.constexpr,
                     PASS: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, STATS: tl.constexpr,
                     SEGMENTS: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
                     TILES_PADDED: tl.constexpr):  # fmt: skip
    """Call COMPUTE at each position that is not masked out.

    x is the student (logits, then the numbers of positions_of), y the teacher or None. Each pass is a launch:

    - "fused" reads a position's rows and computes its results,
    - "merge" computes them from the sums that segments_kernel stored,
    - "exact" reads the rows again, in float64, where the pass before it stored needs_exact.

    COMPUTE gets a tuple of row, summary and temperature for each side.
    """
    SPAN: tl.constexpr = 32 if PASS == "exact" else 1  # positions that a program looks at together
    scales, temperatures = float64_pair(scales), float64_pair(temperatures)
    candidates, lists, records, maxima = memory_of(scratch, tl.program_id(0), words, x, y, K_PADDED, SEGMENTS)
    tile_maxima = maxima if K_PADDED > 0 else None
    for first in range(tl.program_id(0) * SPAN, positions, tl.num_programs(0) * SPAN):
        for position in range(first, end_of_span(needs_exact, first, positions, SPAN)):
            n = position + tl.zeros([], tl.int64)
            if is_due(mask, needs_exact, n, PASS):
                x_row, y_row = row_at(x, n, VEC, ALIGNED), None if y is None else row_at(y, n, VEC, ALIGNED)
                if PASS == "exact":
                    summaries, divergences, broken = summarize_exactly(
                        x_row, y_row, tile_maxima, vocab_size, temperatures, STATS
                    )
                else:
                    if PASS == "fused":
                        for segment in range(segments):
                            sum_segment(x_row, y_row, tile_maxima, records, segment, vocab_size, scales, SEGMENTS,
                                        VEC, STATS)  # fmt: skip
                        tl.debug_barrier()
                    summaries, divergences, broken = summarize(
                        records, segments, scales, temperatures, SEGMENTS, STATS, y is not None
                    )
                    tl.store(needs_exact + n, broken.to(tl.int8))
                if K_PADDED > 0:
                    select(x_row, maxima, vocab_size, lists, candidates[0], K, K_PADDED, TILES_PADDED)
                    if y_row is not None:
                        select(y_row, maxima + 1, vocab_size, lists, candidates[1], K, K_PADDED, TILES_PADDED)
                sides = (x_row, summaries[0], temperatures[0]), (y_row, summaries[-1], temperatures[1])
                COMPUTE(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars, K, OPTION)
                tl.debug_barrier()  # the memory is free for the next position
            elif PASS != "exact":
                tl.store(needs_exact + n, 0)
                store_masked(outputs, n, WIDTHS)


def run_at_positions(
    compute: Any,
    a: Any,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    scalars: Sequence[float | None] = (),
    *,
    mask: Tensor | None,
    k: int = 0,
    stats: tuple[int, int] = (0, 0),
    option: Any = None,
) -> None:
    """Fill the outputs by a JIT function that computes one position.

    Many positions: as many programs as the device holds share them, each with working memory of its own. Few: a kernel
    with a program for each segment of each position comes first, so that all of the device reads.

    `k` best of each row are selected, and `stats` says which sums are kept of each row (row_pass). `option` is what
    COMPUTE is compiled for.
    """
    logits = logits_of(a)
    positions = math.prod(logits[0].shape[:-1])
    if positions == 0:
        return
    device, mask, temperatures = logits[0].device, flags(mask), temperatures_of(a)
    vocab_size = logits[0].shape[-1] if a.vocab_size is None else a.vocab_size
    segments = triton.cdiv(vocab_size, SEGMENT.value)
    segments_padded, k_padded, tiles_padded = triton.next_power_of_2(segments), 0, 0
    size = 4 * 2 * FIELDS.value * segments_padded
    if k:
        k_padded = triton.next_power_of_2(k)
        tiles_padded = max(k_padded, triton.next_power_of_2(triton.cdiv(vocab_size, TILE.value)))
        maxima = 2 * triton.cdiv(vocab_size, BLOCK.value) * TILES.value
        same = len({x.dtype for x in logits}) == 1
        size += 16 * k_padded + 4 * list_size(k_padded) + maxima * (logits[0].element_size() if same else 4)
    per_processor = programs_per_processor(len(logits), k)
    at_once = per_processor * processors(device)
    fused = 2 * positions >= at_once
    programs = min(positions, at_once) if fused else positions
    scratch = torch.empty(programs * (size // 8), dtype=torch.int64, device=device)
    needs_exact = torch.empty(positions, dtype=torch.int8, device=device)
    rows = [*((x, *positions_of(x)) for x in logits), None][:2]
    layout = {"VEC": vector_size(logits), "ALIGNED": all(map(is_aligned, logits)), "STATS": stats,
              "SEGMENTS": segments_padded, "K_PADDED": k_padded, "num_warps": NUM_WARPS}  # fmt: skip
    shape = (size // 8, vocab_size, segments, tuple(float64_bits(scale_of(x)) for x in temperatures))
    arguments = (
        *rows, mask, tuple(map(per_position, inputs)), tuple(outputs), tuple(map(float64_bits, scalars)),
        scratch, needs_exact, positions, *shape, tuple(map(float64_bits, temperatures)),
    )  # fmt: skip
    widths = tuple(x.numel() // positions for x in outputs)
    with torch.cuda.device_of(scratch):
        if not fused:
            segments_kernel[(positions * segments,)](*rows, mask, scratch, *shape, **layout)
        for pass_ in ("fused" if fused else "merge", "exact"):
            positions_kernel[(programs,)](
                *arguments, COMPUTE=compute, OPTION=option, WIDTHS=widths, PASS=pass_, K=k, TILES_PADDED=tiles_padded,
                **layout, **registers(per_processor if pass_ == "fused" else 1),
            )  # fmt: skip


def logits_of(a: Any) -> list[Tensor]:
    """Return the arguments that are logits, the student's first."""
    return [x for name, x in a._asdict().items() if name.endswith("logits")]


def temperatures_of(a: Any) -> list[float]:
    """Return the temperatures of the logits."""
    return [x for name, x in a._asdict().items() if name.endswith("temperature")]


def programs_per_processor(rows: int, k: int) -> int:
    """Return how many row passes a multiprocessor holds at a time: while one selects, the others read.

    Each is 4 warps with 8 loads of 16 bytes in flight, 4 for a single row. Tests check that no registers are spilled.
    """
    if rows == 2:
        return 3 if k <= 32 else 2
    return 5 if k == 0 else 4 if k <= 32 else 3


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":  # in Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def scale_of(temperature: float) -> float:
    """Return the float32 that turns a logit into log2 units."""
    return ctypes.c_float(1 / (math.log(2) * temperature)).value


def vector_size(logits: Sequence[Tensor]) -> int:
    """Return how many adjacent elements are loaded at a time: 16 bytes of the widest."""
    return 16 // max(x.element_size() for x in logits)


def registers(programs: int) -> dict[str, int]:
    """Return the option that limits registers so that this many programs fit; AMD's compiler has none."""
    share = 65536 // (32 * NUM_WARPS * programs)
    return {} if torch.version.hip else {"maxnreg": min(share // 8 * 8, 255)}


def position_axes(logits: Tensor) -> list[tuple[int, int]]:
    """Return sizes and strides of the leading axes, with axes merged that one stride can walk."""
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
    """Return inner, outer_stride and inner_stride, from which row_at finds a row."""
    axes = position_axes(logits)
    (_, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(axes)) + axes
    return inner, outer_stride, inner_stride


def is_aligned(logits: Tensor) -> bool:
    """Return whether every row begins at a multiple of 16 bytes."""
    _, *strides = positions_of(logits)
    return all(number % 16 == 0 for number in (logits.data_ptr(), *(n * logits.element_size() for n in strides)))


def for_any_axes(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Call the operator for each index of the first axis if two strides cannot describe the positions."""

    @functools.wraps(op)
    def wrapped(a: Any) -> tuple[Tensor, ...]:
        logits = logits_of(a)
        if all(len(position_axes(x)) <= 2 for x in logits) or not logits[0].numel():
            return op(a)
        parts = [wrapped(a._make(x[i] if isinstance(x, Tensor) else x for x in a)) for i in range(logits[0].shape[0])]
        return tuple(torch.stack(field) for field in zip(*parts, strict=True))

    return wrapped
