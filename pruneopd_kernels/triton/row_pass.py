"""Read every logit of one or two rows once, for sums and for the maximum of each tile.

A row is cut into segments, the unit of all sums: the bits do not depend on which program sums a segment. A segment is
read in blocks of 16 tiles of 256 ids. Eight lanes of a warp hold a tile, so that nearly all of the work is in-thread,
and a tile's maximum takes three shuffles.

Sums are relative to an integer in log2 units for each tile of a block. It follows the maximum, so that moving it scales
by an exact power of two, and nothing overflows.

STATS has a number for each row, x first: 0 if its mass is enough, 1 if its entropy needs the sum own too, 2 if its
divergence from the other row needs the sum other, too. Without `maxima` nothing will be selected; without `y_row`, x is
alone.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(256)
LANES = tl.constexpr(8)  # that hold a tile
TILES = tl.constexpr(16)  # in a block
BLOCK = tl.constexpr(4096)
SEGMENT = tl.constexpr(32768)
NUM_WARPS = 4  # TILE, LANES and TILES are made for it

# The record of a row's segment: FIELDS float32.
REFERENCE, MASS, OWN, OTHER, GREATEST, PEAK, PARTNER = (tl.constexpr(i) for i in range(7))
FIELDS = tl.constexpr(7)

LOWEST = tl.constexpr(-(2.0**23))  # the reference before the first finite logit
WILD = tl.constexpr(2.0**60)  # times a probability that float32 holds as 0, a difference of this size may count


@triton.jit
def block_ids(VEC: tl.constexpr):
    """Return a block's ids in the order of loading: VEC adjacent ones by lane, tiles by eight lanes."""
    i = tl.arange(0, BLOCK)
    lane = i // VEC % LANES
    tile = i // (VEC * LANES) % TILES
    part = i // (VEC * LANES * TILES)
    return tile * TILE + part * (VEC * LANES) + lane * VEC + i % VEC


@triton.jit
def by_lane(x, VEC: tl.constexpr):
    """Reshape [BLOCK] as loaded to [TILES, LANES, elements of a lane]; no data moves."""
    PARTS: tl.constexpr = BLOCK // (VEC * LANES * TILES)
    x = tl.reshape(x, [PARTS, TILES, LANES, VEC])
    return tl.reshape(tl.permute(x, [1, 2, 0, 3]), [TILES, LANES, PARTS * VEC])


@triton.jit
def load_lanes(row, first, end, VEC: tl.constexpr, MASKED: tl.constexpr):
    """Return a block of a row in float32, -inf beyond its end, and whether an id is before the end."""
    ids = first + block_ids(VEC)
    inside = ids < end
    x = tl.load(row + ids, mask=inside, other=float("-inf")) if MASKED else tl.load(row + ids)
    return by_lane(x.to(tl.float32), VEC), by_lane(inside, VEC)


@triton.jit
def advance(x, reference, greatest, scale):
    """Return a row's references and greatest logits after a block, and the maxima of the block's tiles."""
    lane_max = tl.max(x, 2)
    tile_max = tl.max(lane_max, 1)
    return tl.maximum(reference, tl.ceil(tile_max * scale)), tl.maximum(greatest, lane_max), tile_max


@triton.jit
def distances(x, reference, scale):
    return tl.fma(x, scale, -reference[:, None, None])


@triton.jit
def half(x, WHICH: tl.constexpr):
    """Return every second element of a lane: half at a time saves registers."""
    halves = tl.split(tl.reshape(x, [TILES, LANES, x.shape[2] // 2, 2]))
    return halves[WHICH]


@triton.jit
def add_block(x_row, y_row, first, end, maxima, x_scale, y_scale, x_state, y_state, VEC: tl.constexpr,
              STATS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add a block to the states of its rows: reference by tile; by lane mass, own, other, greatest logit."""
    if y_row is None:
        return add_block_of_one(x_row, first, end, maxima, x_scale, x_state, VEC, STATS, MASKED), y_state
    else:
        return add_block_of_pair(
            x_row, y_row, first, end, maxima, x_scale, y_scale, x_state, y_state, VEC, STATS, MASKED
        )


@triton.jit
def add_block_of_one(row, first, end, maxima, scale, state, VEC: tl.constexpr, STATS: tl.constexpr,
                     MASKED: tl.constexpr):  # fmt: skip
    reference, mass, own, other, greatest = state
    x, _ = load_lanes(row, first, end, VEC, MASKED)
    new, greatest, tile_max = advance(x, reference, greatest, scale)
    if maxima is not None:
        tile = tl.arange(0, TILES) + first // TILE
        tl.store(maxima + 2 * tile, tile_max.to(maxima.dtype.element_ty))
    move = (reference - new)[:, None]
    factor = tl.exp2(move)
    if STATS[0] > 0:
        own = factor * (own + move * mass)
    mass = factor * mass
    for i in tl.static_range(2):
        d = distances(half(x, i), new, scale)
        m = tl.exp2(d)
        mass += tl.sum(m, 2)
        if STATS[0] > 0:
            own += tl.sum(m * tl.maximum(d, LOWEST), 2)  # nothing is multiplied by -inf
    return new, mass, own, other, greatest


@triton.jit
def add_block_of_pair(x_row, y_row, first, end, maxima, x_scale, y_scale, x_state, y_state, VEC: tl.constexpr,
                      STATS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    xr, xm, xo, xt, xg = x_state
    yr, ym, yo, yt, yg = y_state
    x, inside = load_lanes(x_row, first, end, VEC, MASKED)
    y, _ = load_lanes(y_row, first, end, VEC, MASKED)
    xr_new, xg, x_tile_max = advance(x, xr, xg, x_scale)
    yr_new, yg, y_tile_max = advance(y, yr, yg, y_scale)
    if maxima is not None:
        tile, side = tl.arange(0, TILES) + first // TILE, tl.arange(0, 2)
        both = tl.join(x_tile_max, y_tile_max).to(maxima.dtype.element_ty)
        tl.store(maxima + 2 * tile[:, None] + side[None, :], both)
    x_move, y_move = (xr - xr_new)[:, None], (yr - yr_new)[:, None]
    x_factor, y_factor = tl.exp2(x_move), tl.exp2(y_move)
    if STATS[0] > 0:
        xo = x_factor * (xo + x_move * xm)
    if STATS[0] > 1:
        xt = unless_wild(x_factor * (xt + y_move * xm), y, inside, y_scale, MASKED)
    if STATS[1] > 0:
        yo = y_factor * (yo + y_move * ym)
    if STATS[1] > 1:
        yt = unless_wild(y_factor * (yt + x_move * ym), x, inside, x_scale, MASKED)
    xm, ym = x_factor * xm, y_factor * ym
    for i in tl.static_range(2):
        dx, dy = distances(half(x, i), xr_new, x_scale), distances(half(y, i), yr_new, y_scale)
        mx, my = tl.exp2(dx), tl.exp2(dy)
        xm, ym = xm + tl.sum(mx, 2), ym + tl.sum(my, 2)
        if MASKED:  # nothing is multiplied by the -inf beyond the end
            dx, dy = tl.where(half(inside, i), dx, 0.0), tl.where(half(inside, i), dy, 0.0)
        if STATS[0] > 0:
            xo += tl.sum(mx * dx, 2)
        if STATS[0] > 1:
            xt += tl.sum(mx * dy, 2)
        if STATS[1] > 0:
            yo += tl.sum(my * dy, 2)
        if STATS[1] > 1:
            yt += tl.sum(my * dx, 2)
    return (xr_new, xm, xo, xt, xg), (yr_new, ym, yo, yt, yg)


@triton.jit
def unless_wild(other, partner, inside, scale, MASKED: tl.constexpr):
    """Return the sums of the lanes, NaN if the partner has a logit for which the exact pass must add them."""
    least = tl.min(tl.where(inside, partner, 0.0) if MASKED else partner, 2)
    return tl.where(least * scale < -WILD, float("nan"), other)


@triton.jit
def sum_segment(x_row, y_row, maxima, records, segment, vocab_size, scales, SEGMENTS: tl.constexpr, VEC: tl.constexpr,
                STATS: tl.constexpr):  # fmt: skip
    """Sum one segment of a position's rows and store the records."""
    x_scale, y_scale = scales[0].to(tl.float32), scales[1].to(tl.float32)
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, vocab_size)
    whole = begin + (end - begin) // BLOCK * BLOCK
    lowest = tl.full([TILES], LOWEST, tl.float32)
    zeros = tl.zeros([TILES, LANES], tl.float32)
    row = (lowest, zeros, zeros, zeros, zeros - float("inf"))
    x_state, y_state = row, row
    for first in range(begin, whole, BLOCK):
        x_state, y_state = add_block(
            x_row, y_row, first, end, maxima, x_scale, y_scale, x_state, y_state, VEC, STATS, False
        )
    if whole < end:
        x_state, y_state = add_block(
            x_row, y_row, whole, end, maxima, x_scale, y_scale, x_state, y_state, VEC, STATS, True
        )
    records += segment
    close_segment(x_state, y_state[0], x_row, y_row, begin, end, x_scale, y_scale, records, SEGMENTS, VEC, STATS[0])
    if y_row is not None:
        records += FIELDS * SEGMENTS
        close_segment(y_state, x_state[0], y_row, x_row, begin, end, y_scale, x_scale, records, SEGMENTS, VEC, STATS[1])


@triton.jit
def close_segment(state, partner_tiles, row, partner_row, begin, end, scale, partner_scale, record,
                  SEGMENTS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr):  # fmt: skip
    """Sum the lanes of one row, at one reference, and store the record."""
    tiles, mass, own, other, greatest = state
    reference = tl.max(tiles, 0)
    move = (tiles - reference)[:, None]
    factor = tl.exp2(move)
    total = tl.sum(mass * factor)
    tl.store(record + REFERENCE * SEGMENTS, reference)
    tl.store(record + MASS * SEGMENTS, total)
    partner_reference = tl.max(partner_tiles, 0)
    own = factor * (own + move * mass)
    other = factor * (other + (partner_tiles - partner_reference)[:, None] * mass)
    mass = factor * mass
    if STATS > 0:
        tl.store(record + OWN * SEGMENTS, tl.sum(own))
    if STATS > 1:
        tl.store(record + OTHER * SEGMENTS, tl.sum(other))
    peak = tl.max(greatest)
    # A loss saves the excess of a peak that has more than two thirds of its row; it is always apart here.
    apart = 5 * tl.exp2(peak * scale - reference) > 3 * total
    tl.store(record + GREATEST * SEGMENTS, peak)
    tl.store(record + PEAK * SEGMENTS, tl.where(apart, peak, float("-inf")))
    if apart:
        store_rest(mass, own, other, greatest == peak, peak, row, partner_row, begin, end, scale, partner_scale,
                   reference, partner_reference, record, SEGMENTS, VEC, STATS)  # fmt: skip


@triton.jit
def store_rest(mass, own, other, hot, peak, row, partner_row, begin, end, scale, partner_scale, reference,
               partner_reference, record, SEGMENTS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr):  # fmt: skip
    """Store the record's sums without its peak, a logit that is most of the segment.

    All the entropy of such a row is in the rest, which a float32 that already holds the peak rounds away. So the lane
    that holds it is summed again without it.
    """
    PARTS: tl.constexpr = TILE // (VEC * LANES)
    lane = tl.max(tl.where(hot, tl.arange(0, TILES)[:, None] * LANES + tl.arange(0, LANES)[None, :], 0))
    i = tl.arange(0, SEGMENT // (TILES * LANES))  # of that lane
    part = i // VEC % PARTS
    ids = begin + i // (VEC * PARTS) * BLOCK + lane // LANES * TILE
    ids += part * (VEC * LANES) + lane % LANES * VEC + i % VEC
    inside = ids < end
    x = tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32)
    counts = inside & (x != peak)
    d = tl.where(counts, tl.fma(x, scale, -reference), 0.0)
    m = tl.where(counts, tl.exp2(d), 0.0)
    tl.store(record + MASS * SEGMENTS, tl.sum(tl.where(hot, 0.0, mass)) + tl.sum(m))
    if STATS > 0:
        d = d if partner_row is not None else tl.maximum(d, LOWEST)
        tl.store(record + OWN * SEGMENTS, tl.sum(tl.where(hot, 0.0, own)) + tl.sum(m * d))
    if STATS > 1:
        y = tl.load(partner_row + ids, mask=inside, other=0.0).to(tl.float32)
        partner_d = tl.fma(y, partner_scale, -partner_reference)
        partner_d = tl.where(partner_d < -WILD, float("nan"), partner_d)
        tl.store(record + OTHER * SEGMENTS, tl.sum(tl.where(hot, 0.0, other)) + tl.sum(m * partner_d))
        tl.store(record + PARTNER * SEGMENTS, tl.sum(tl.where(x == peak, y, 0.0)))
