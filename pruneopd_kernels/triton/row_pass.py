"""The row pass: every logit of a position once, for sums and for the maximum of each tile.

A row is cut into segments, which are the unit of all sums: whoever adds a segment, one program after the other or
many at a time, the bits are the same. A segment is walked in blocks of 16 tiles of 256 ids. Eight lanes of a warp hold
a tile, so that in-thread operations do nearly all of the work, and a tile's maximum takes three shuffles.

Sums are relative to an integer in log2 units, one for each tile of a block, that follows the maximum: then moving it
scales by an exact power of two, and nothing ever overflows.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(256)
LANES = tl.constexpr(8)  # that hold a tile
TILES = tl.constexpr(16)  # in a block
BLOCK = tl.constexpr(4096)
SEGMENT = tl.constexpr(32768)
NUM_WARPS = 4  # TILE, LANES and TILES are made for it

# What is known of a row's segment: FIELDS float32 each.
REFERENCE, MASS, OWN, OTHER, PEAK, PARTNER = (tl.constexpr(i) for i in range(6))
FIELDS = tl.constexpr(6)

LOWEST = tl.constexpr(-(2.0**23))  # the reference where there is no finite logit yet


@triton.jit
def block_ids(VEC: tl.constexpr):
    """The ids of a block in the order in which they are loaded: VEC adjoining ones by lane, tiles by eight lanes."""
    i = tl.arange(0, BLOCK)
    lane = i // VEC % LANES
    tile = i // (VEC * LANES) % TILES
    part = i // (VEC * LANES * TILES)
    return tile * TILE + part * (VEC * LANES) + lane * VEC + i % VEC


@triton.jit
def by_lane(x, VEC: tl.constexpr):
    """[BLOCK] as loaded -> [TILES, LANES, what a lane holds]; no data moves."""
    PARTS: tl.constexpr = BLOCK // (VEC * LANES * TILES)
    x = tl.reshape(x, [PARTS, TILES, LANES, VEC])
    return tl.reshape(tl.permute(x, [1, 2, 0, 3]), [TILES, LANES, PARTS * VEC])


@triton.jit
def load_lanes(row, first, end, VEC: tl.constexpr, MASKED: tl.constexpr):
    """A block of a row in float32, -inf beyond its end, and whether an id is before the end."""
    ids = first + block_ids(VEC)
    inside = ids < end
    x = tl.load(row + ids, mask=inside, other=float("-inf")) if MASKED else tl.load(row + ids)
    return by_lane(x.to(tl.float32), VEC), by_lane(inside, VEC)


@triton.jit
def terms(x, y, x_reference, y_reference, x_scale, y_scale, inside, STATS: tl.constexpr, MASKED: tl.constexpr):
    """Sums over what a lane holds: of both rows' masses m, and with STATS of m * d for either row's d."""
    dx = tl.fma(x, x_scale, -x_reference[:, None, None])
    dy = tl.fma(y, y_scale, -y_reference[:, None, None])
    mx, my = tl.exp2(dx), tl.exp2(dy)
    x_mass, y_mass = tl.sum(mx, 2), tl.sum(my, 2)
    if STATS:
        if MASKED:  # nothing is multiplied by the -inf beyond the end
            dx, dy = tl.where(inside, dx, 0.0), tl.where(inside, dy, 0.0)
        return x_mass, y_mass, tl.sum(mx * dx, 2), tl.sum(my * dy, 2), tl.sum(mx * dy, 2), tl.sum(my * dx, 2)
    else:
        return x_mass, y_mass, x_mass, y_mass, x_mass, y_mass


@triton.jit
def half(x, WHICH: tl.constexpr):
    """Every second element of a lane: half at a time, for registers are few."""
    halves = tl.split(tl.reshape(x, [TILES, LANES, x.shape[2] // 2, 2]))
    return halves[WHICH]


@triton.jit
def add_block(x_row, y_row, first, end, maxima, x_scale, y_scale, x_state, y_state, VEC: tl.constexpr,
              STATS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Adds a block of both rows to their states: reference by tile; by lane mass, own, other, greatest logit."""
    xr, xm, xo, xt, xg = x_state
    yr, ym, yo, yt, yg = y_state
    x, inside = load_lanes(x_row, first, end, VEC, MASKED)
    y, _ = load_lanes(y_row, first, end, VEC, MASKED)
    x_lane_max, y_lane_max = tl.max(x, 2), tl.max(y, 2)
    x_tile_max, y_tile_max = tl.max(x_lane_max, 1), tl.max(y_lane_max, 1)
    tile, side = tl.arange(0, TILES) + first // TILE, tl.arange(0, 2)
    both = tl.join(x_tile_max, y_tile_max).to(maxima.dtype.element_ty)
    tl.store(maxima + 2 * tile[:, None] + side[None, :], both)
    xr_new = tl.maximum(xr, tl.ceil(x_tile_max * x_scale))
    yr_new = tl.maximum(yr, tl.ceil(y_tile_max * y_scale))
    x_move, y_move = (xr - xr_new)[:, None], (yr - yr_new)[:, None]
    x_factor, y_factor = tl.exp2(x_move), tl.exp2(y_move)
    if STATS:
        xo, yo = x_factor * (xo + x_move * xm), y_factor * (yo + y_move * ym)
        xt, yt = x_factor * (xt + y_move * xm), y_factor * (yt + x_move * ym)
    xg, yg = tl.maximum(xg, x_lane_max), tl.maximum(yg, y_lane_max)
    xm, ym = x_factor * xm, y_factor * ym
    for i in tl.static_range(2):
        sums = terms(half(x, i), half(y, i), xr_new, yr_new, x_scale, y_scale, half(inside, i), STATS, MASKED)
        xm, ym = xm + sums[0], ym + sums[1]
        if STATS:
            xo, yo, xt, yt = xo + sums[2], yo + sums[3], xt + sums[4], yt + sums[5]
    return (xr_new, xm, xo, xt, xg), (yr_new, ym, yo, yt, yg)


@triton.jit
def sum_segment(x_row, y_row, maxima, records, segment, vocab_size, x_scale, y_scale,
                SEGMENTS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr):  # fmt: skip
    """Adds one segment of both rows and stores what is known of it."""
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
    close_segment(x_state, y_state[0], x_row, y_row, begin, end, x_scale, y_scale, records, SEGMENTS, VEC, STATS)
    records += FIELDS * SEGMENTS
    close_segment(y_state, x_state[0], y_row, x_row, begin, end, y_scale, x_scale, records, SEGMENTS, VEC, STATS)


@triton.jit
def close_segment(state, partner_tiles, row, partner_row, begin, end, scale, partner_scale, record,
                  SEGMENTS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr):  # fmt: skip
    """Brings the lanes of one row to one reference, adds them up and stores the record."""
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
    if STATS:
        tl.store(record + OWN * SEGMENTS, tl.sum(own))
        tl.store(record + OTHER * SEGMENTS, tl.sum(other))
    peak = tl.max(greatest)
    apart = 4 * tl.exp2(peak * scale - reference) > 3 * total
    tl.store(record + PEAK * SEGMENTS, tl.where(apart, peak, float("-inf")))
    if apart:
        store_rest(mass, own, other, greatest == peak, peak, row, partner_row, begin, end, scale, partner_scale,
                   reference, partner_reference, record, SEGMENTS, VEC, STATS)  # fmt: skip


@triton.jit
def store_rest(mass, own, other, hot, peak, row, partner_row, begin, end, scale, partner_scale, reference,
               partner_reference, record, SEGMENTS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr):  # fmt: skip
    """The record's sums without its peak, a logit that is most of the segment.

    All the entropy of a row like that is in what is left, which a float32 that already holds the peak rounds away. So
    the lane that holds it is summed again without it.
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
    if STATS:
        y = tl.load(partner_row + ids, mask=inside, other=0.0).to(tl.float32)
        partner_d = tl.fma(y, partner_scale, -partner_reference)
        tl.store(record + OWN * SEGMENTS, tl.sum(tl.where(hot, 0.0, own)) + tl.sum(m * d))
        tl.store(record + OTHER * SEGMENTS, tl.sum(tl.where(hot, 0.0, other)) + tl.sum(m * partner_d))
        tl.store(record + PARTNER * SEGMENTS, tl.sum(tl.where(x == peak, y, 0.0)))
