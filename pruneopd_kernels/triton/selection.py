"""Select the k best of a row from its tile maxima, in like steps: tiles, parts of tiles, elements.

Of contiguous ranges of ids, the first k by (maximum descending, id ascending) hold the whole top-k: an element of a
later range comes after those k maxima. So every step leaves exactly k, regardless of the row, and nothing overflows.
"""

import triton
import triton.language as tl

from .order import NOTHING, key_shift, order_of
from .row_pass import BLOCK, TILE

EMPTY = tl.constexpr(-0x7F800000 << 32)  # the key of -inf lies below, that of every finite logit above


@triton.constexpr_function
def steps_of(k_padded):
    """Return the sizes of the ranges; small factors for large k, so that the maxima of a step fit in registers."""
    return (TILE.value, 8, 1) if k_padded < 64 else (TILE.value, 32, 4, 1)


@triton.constexpr_function
def list_size(k_padded):
    """Return how many int32 of working memory a selection needs; k_padded is 0 if nothing is selected."""
    sizes = steps_of(k_padded)
    parts = k_padded * sizes[0] // sizes[1]
    return (len(sizes) - 1) * k_padded + (parts if parts > BLOCK.value // sizes[1] else 0)


@triton.jit
def count_from(keys, least):
    return tl.sum((keys >= least.to(tl.int32)).to(tl.int32), 0)


@triton.jit
def least_chosen(keys, k, low):
    """Return the k-th greatest key, or a lesser one that only the k greatest reach; at least k keys are >= `low`.

    Bisection takes alike steps for every row and k.
    """
    low = low.to(tl.int64)
    high = tl.where(count_from(keys, low + 1) < k, low, tl.max(keys, 0).to(tl.int64))
    while low < high:
        middle = (low + high + 1) >> 1
        n = count_from(keys, middle)
        low = tl.where(n < k, low, middle)
        high = tl.where(n > k, high, tl.where(n < k, middle - 1, middle))
    return low.to(tl.int32)


@triton.jit
def places(keys, k, low):
    """Return a lower bound of the k greatest keys, which keys they are (the first of equal ones), and their places."""
    least = least_chosen(keys, k, low)
    above = keys > least
    equal = keys == least
    counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # both in one scan
    n_above, n_equal = counts & 0xFFFF, counts >> 16
    room = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (n_equal <= room))
    return least, chosen, n_above + tl.minimum(n_equal, room) - 1


@triton.jit
def parts_of(ranges, slot, K: tl.constexpr, FACTOR: tl.constexpr):
    """Return the number in the row of the slot-th part of the listed ranges, and whether its range is one of k."""
    listed = slot // FACTOR < K
    return tl.load(ranges + slot // FACTOR, mask=listed, other=0) * FACTOR + slot % FACTOR, listed


@triton.jit
def part_keys(row, part, listed, vocab_size, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """Return the greatest key in each part."""
    ids = part[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    exists = listed[:, None] & (ids < vocab_size)
    keys = order_of(tl.load(row + ids, mask=exists, other=0.0), SHIFT)
    return tl.max(tl.where(exists, keys, NOTHING >> SHIFT), 1)


@triton.jit
def narrow(row, ranges, least, vocab_size, memory, K: tl.constexpr, K_PADDED: tl.constexpr, FROM: tl.constexpr,
           TO: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Return the parts of size TO of k ranges of size FROM, their keys, and the `places` of the k best."""
    FACTOR: tl.constexpr = FROM // TO
    AT_ONCE: tl.constexpr = BLOCK // TO
    slot = tl.arange(0, K_PADDED * FACTOR)
    part, listed = parts_of(ranges, slot, K, FACTOR)
    if K_PADDED * FACTOR <= AT_ONCE:
        keys = part_keys(row, part, listed, vocab_size, TO, SHIFT)
    else:
        for first in range(0, K_PADDED * FACTOR, AT_ONCE):
            some = first + tl.arange(0, AT_ONCE)
            some_part, some_listed = parts_of(ranges, some, K, FACTOR)
            tl.store(memory + some, part_keys(row, some_part, some_listed, vocab_size, TO, SHIFT))
        tl.debug_barrier()
        keys = tl.load(memory + slot)
    least, chosen, place = places(keys, K, least)
    return part, keys, least, chosen, place


@triton.jit
def select(row, maxima, vocab_size, lists, candidates, K: tl.constexpr, K_PADDED: tl.constexpr,
           TILES_PADDED: tl.constexpr):  # fmt: skip
    """Store the k best of a row, in the order of their ids: key << 32 | ~id, distinct, the best the greatest.

    The key is that of a float32, whatever the row's dtype: a candidate that is not above EMPTY is an empty slot.
    """
    SHIFT: tl.constexpr = key_shift(row.dtype.element_ty)
    SIZES: tl.constexpr = steps_of(K_PADDED)
    STEPS: tl.constexpr = len(SIZES) - 1
    memory = lists + STEPS * K_PADDED
    lowest = tl.full([], NOTHING >> SHIFT, tl.int32)
    tile = tl.arange(0, TILES_PADDED)
    exists = tile * TILE < vocab_size
    keys = tl.where(exists, order_of(tl.load(maxima + 2 * tile, mask=exists, other=0.0), SHIFT), lowest)
    least, chosen, place = places(keys, K, lowest)
    tl.store(lists + place, tile, mask=chosen)
    tl.debug_barrier()
    for i in tl.static_range(STEPS - 1):
        part, _, least, chosen, place = narrow(
            row, lists + i * K_PADDED, least, vocab_size, memory, K, K_PADDED, SIZES[i], SIZES[i + 1], SHIFT
        )
        tl.store(lists + (i + 1) * K_PADDED + place, part, mask=chosen)
        tl.debug_barrier()
    ids, keys, least, chosen, place = narrow(
        row, lists + (STEPS - 1) * K_PADDED, least, vocab_size, memory, K, K_PADDED, SIZES[STEPS - 1], 1, SHIFT
    )
    tl.store(candidates + place, (keys.to(tl.int64) << 32 + SHIFT) | (0xFFFFFFFF - ids.to(tl.int64)), mask=chosen)
    tl.debug_barrier()


@triton.jit
def id_of(candidate):
    return (0xFFFFFFFF - (candidate & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def ranked(candidates, K: tl.constexpr):
    """Return a row's candidates and their ranks (k for padding)."""
    j = tl.arange(0, triton.next_power_of_2(K))
    x = tl.load(candidates + j, mask=j < K, other=-(2**63))
    rank = tl.zeros(j.shape, tl.int32)
    for i in range(K):
        rank += (tl.load(candidates + i) > x).to(tl.int32)
    return x, rank


@triton.jit
def compare(candidates, K: tl.constexpr):
    """Return both sides' candidates, their ranks, and the overlap (eq. 6): empty slots match nothing."""
    x, x_rank = ranked(candidates[0], K)
    y, y_rank = ranked(candidates[1], K)
    common = tl.zeros(x.shape, tl.int1)
    x_id = id_of(x)
    for i in range(K):
        y_i = tl.load(candidates[1] + i)
        common |= (y_i > EMPTY) & (x_id == id_of(y_i))
    share = count(common & (x > EMPTY)).to(tl.float64) / tl.maximum(tl.maximum(count(x > EMPTY), count(y > EMPTY)), 1)
    return x, y, x_rank, y_rank, share


@triton.jit
def count(flags):
    """Count along the last axis."""
    return tl.sum(flags.to(tl.int32), len(flags.shape) - 1)
