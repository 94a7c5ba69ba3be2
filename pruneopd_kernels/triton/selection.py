"""The k best of a row from its tile maxima, in three steps of one kind: tiles, pieces of tiles, elements.

Of contiguous ranges of ids, the first k by (maximum descending, id ascending) hold the whole top-k: an element of a
later range comes after those k maxima. So every step leaves exactly k, whatever the row, and nothing can overflow.
"""

import triton
import triton.language as tl

from .order import NOTHING, order_of
from .row_pass import BLOCK, TILE


# Of which maxima are formed within a tile; larger for large k, so that there are not too many of them.
@triton.constexpr_function
def piece_size(k_padded):
    return 8 if k_padded <= 64 else 16


def list_size(k_padded: int) -> int:
    """int32 of working memory that a selection needs."""
    pieces = k_padded * TILE.value // piece_size(k_padded)
    return 2 * k_padded + (pieces if pieces > BLOCK.value // piece_size(k_padded) else 0)


@triton.jit
def count_from(keys, least):
    return tl.sum((keys >= least.to(tl.int32)).to(tl.int32), 0)


@triton.jit
def least_chosen(keys, k, low):
    """The k-th greatest key, or a lesser one that no key but the k greatest reaches; at least k are not below `low`.

    By bisection, for its steps are alike for every row and all k.
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
    """A lower bound of the k greatest keys; which keys those are, of equal ones the first; their places among those."""
    least = least_chosen(keys, k, low)
    above = keys > least
    equal = keys == least
    counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # both in one scan
    n_above, n_equal = counts & 0xFFFF, counts >> 16
    room = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (n_equal <= room))
    return least, chosen, n_above + tl.minimum(n_equal, room) - 1


@triton.jit
def load_pieces(row, tiles, slot, vocab_size, K: tl.constexpr, PIECE: tl.constexpr, SHIFT: tl.constexpr):
    """Of the slot-th pieces in the listed tiles their number in the row and the greatest key."""
    PIECES: tl.constexpr = TILE // PIECE
    listed = slot // PIECES < K
    piece = tl.load(tiles + slot // PIECES, mask=listed, other=0) * PIECES + slot % PIECES
    ids = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    exists = listed[:, None] & (ids < vocab_size)
    x = tl.load(row + ids, mask=exists, other=0.0)
    return piece, tl.max(tl.where(exists, order_of(x, SHIFT), NOTHING >> SHIFT), 1)


@triton.jit
def select(row, maxima, vocab_size, lists, candidates, K: tl.constexpr, K_PADDED: tl.constexpr,
           TILES_PADDED: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Stores the k best of a row, in the order of their ids: key << 32 | ~id, distinct, the best the greatest."""
    PIECE: tl.constexpr = piece_size(K_PADDED)
    PIECES: tl.constexpr = TILE // PIECE
    AT_ONCE: tl.constexpr = BLOCK // PIECE  # pieces looked at together
    lowest = tl.full([], NOTHING >> SHIFT, tl.int32)

    tile = tl.arange(0, TILES_PADDED)
    exists = tile * TILE < vocab_size
    keys = tl.where(exists, order_of(tl.load(maxima + 2 * tile, mask=exists, other=0.0), SHIFT), lowest)
    least, chosen, place = places(keys, K, lowest)
    tl.store(lists + place, tile, mask=chosen)
    tl.debug_barrier()

    piece_list = lists + K_PADDED
    slot = tl.arange(0, K_PADDED * PIECES)
    if K_PADDED * PIECES <= AT_ONCE:
        piece, keys = load_pieces(row, lists, slot, vocab_size, K, PIECE, SHIFT)
    else:
        piece_keys = piece_list + K_PADDED
        for first in range(0, K_PADDED * PIECES, AT_ONCE):
            some = first + tl.arange(0, AT_ONCE)
            _, some_keys = load_pieces(row, lists, some, vocab_size, K, PIECE, SHIFT)
            tl.store(piece_keys + some, some_keys)
        tl.debug_barrier()
        keys = tl.load(piece_keys + slot)
        piece = tl.load(lists + slot // PIECES, mask=slot // PIECES < K, other=0) * PIECES + slot % PIECES
    least, chosen, place = places(keys, K, least)
    tl.store(piece_list + place, piece, mask=chosen)
    tl.debug_barrier()

    slot = tl.arange(0, K_PADDED * PIECE)
    listed = slot // PIECE < K
    ids = tl.load(piece_list + slot // PIECE, mask=listed, other=0) * PIECE + slot % PIECE
    exists = listed & (ids < vocab_size)
    keys = tl.where(exists, order_of(tl.load(row + ids, mask=exists, other=0.0), SHIFT), lowest)
    least, chosen, place = places(keys, K, least)
    tl.store(candidates + place, (keys.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64)), mask=chosen)
    tl.debug_barrier()


@triton.jit
def id_of(candidate):
    return (0xFFFFFFFF - (candidate & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def compare(x_candidates, y_candidates, K: tl.constexpr, K_PADDED: tl.constexpr):
    """Both sides' candidates, their ranks, and how many of x's ids are among y's. Of padding the rank is k."""
    j = tl.arange(0, K_PADDED)
    x = tl.load(x_candidates + j, mask=j < K, other=-(2**63))
    y = tl.load(y_candidates + j, mask=j < K, other=-(2**63))
    x_rank, y_rank = tl.zeros([K_PADDED], tl.int32), tl.zeros([K_PADDED], tl.int32)
    common = tl.zeros([K_PADDED], tl.int1)
    x_id = id_of(x)
    for i in range(K):
        x_i, y_i = tl.load(x_candidates + i), tl.load(y_candidates + i)
        x_rank += (x_i > x).to(tl.int32)
        y_rank += (y_i > y).to(tl.int32)
        common |= x_id == id_of(y_i)
    return x, y, x_rank, y_rank, tl.sum((common & (j < K)).to(tl.int32), 0)
