"""Make summaries of rows from the row pass: log-sum-exp, entropy, KL, log-probabilities. All in float64.

A summary is a tuple: reference (the greatest logit), log of the mass relative to it, log-sum-exp, entropy.
"""

import triton
import triton.language as tl

from .row_pass import FIELDS, GREATEST, LOWEST, MASS, OTHER, OWN, PARTNER, PEAK, REFERENCE, TILE

LN2 = tl.constexpr(0.693147180559945309417232121458176568)
TAME = tl.constexpr(2.0**22)  # references beyond it are too coarse
LEAST_SCALE = tl.constexpr(1e-30)  # its inverse is the greatest
EXACT_BLOCK = tl.constexpr(1024)


@triton.jit
def float64(bits):
    """Return a float64 argument: Triton's own floats are float32, so its bits are passed as an integer."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def float64_pair(bits):
    """Return x's and y's float64 argument, which are the same without a y."""
    return float64(bits[0]), float64(bits[-1])


@triton.jit
def logprob(x, summary, temperature):
    """Return log p of a logit. The reference is subtracted first: beside a huge one the mass would vanish."""
    reference, log_mass, _, _ = summary
    return (x.to(tl.float64) - reference) / temperature - log_mass


@triton.jit
def logprobs_at(side, ids, exists):
    """Return log-probabilities of ids. A side is a row, its summary and its temperature."""
    row, summary, temperature = side
    return logprob(tl.load(row + ids, mask=exists, other=0.0), summary, temperature)


@triton.jit
def state_of(side):
    """Return a row's reference logit, mass relative to it, and mean of the distance from it; NaN if it is broken."""
    reference, log_mass, _, entropy = side[1]
    nothing = reference - reference
    return reference, tl.exp(log_mass) + nothing, log_mass - entropy + nothing


@triton.jit
def store_all(at, values):
    """Store values in adjacent places."""
    for i in tl.static_range(len(values)):
        tl.store(at + i, values[i])


@triton.jit
def store_divergence(state, sides, kl, excess):
    """Store what the backward pass needs. An excess of 0 is KL + offset if both logits equal their references."""
    student, teacher = state_of(sides[0]), state_of(sides[1])
    offset = kl + tl.log(student[1]) - tl.log(teacher[1])
    store_all(state, (student[0], student[1], teacher[0], offset, excess))


@triton.jit
def load_field(record, FIELD: tl.constexpr, segment, SEGMENTS: tl.constexpr, exists, other):
    return tl.load(record + FIELD * SEGMENTS + segment, mask=exists, other=other).to(tl.float64)


@triton.jit
def row_sums(record, partner_record, segments, scale, partner_scale, SEGMENTS: tl.constexpr, STATS: tl.constexpr):
    """Return reference, mass, own and other of a row, in log2 units; its greatest logit; the excess of its peak.

    The excess is by how much log p - log q of the greatest logit exceeds the mean under p, if that logit is a peak. It
    is summed over all other mass times a difference, so that no digits cancel if that mass is small.
    """
    segment = tl.arange(0, SEGMENTS)
    exists = segment < segments
    references = load_field(record, REFERENCE, segment, SEGMENTS, exists, LOWEST)
    masses = load_field(record, MASS, segment, SEGMENTS, exists, 0.0)
    reference = tl.max(references, 0)
    move = references - reference
    factor = tl.exp2(move)
    mass = tl.sum(factor * masses, 0)
    peaks = load_field(record, PEAK, segment, SEGMENTS, exists, float("-inf"))
    is_peak = peaks > float("-inf")
    d = tl.where(is_peak, peaks * scale - reference, 0.0)
    m = tl.where(is_peak, tl.exp2(d), 0.0)
    mass += tl.sum(m, 0)
    greatest = tl.max(load_field(record, GREATEST, segment, SEGMENTS, exists, float("-inf")), 0)
    own, other, excess = mass, mass, mass
    if STATS > 0:
        owns = factor * (load_field(record, OWN, segment, SEGMENTS, exists, 0.0) + move * masses)
        own = tl.sum(owns + m * d, 0)
    if STATS > 1:
        partner_references = load_field(partner_record, REFERENCE, segment, SEGMENTS, exists, LOWEST)
        partner_reference = tl.max(partner_references, 0)
        others = load_field(record, OTHER, segment, SEGMENTS, exists, 0.0)
        partner_d = load_field(record, PARTNER, segment, SEGMENTS, is_peak, 0.0) * partner_scale - partner_reference
        others = factor * (others + (partner_references - partner_reference) * masses)
        other = tl.sum(others + m * partner_d, 0)
        of_peak = tl.sum(tl.where(peaks == greatest, d - partner_d, 0.0), 0)
        excess = of_peak * factor * masses - (owns - others) + m * (of_peak - (d - partner_d))
        excess = tl.sum(excess, 0) / mass
    return reference, mass, own, other, greatest, excess


@triton.jit
def is_tame(sums, scale, STATS: tl.constexpr):
    """Return whether everything is finite and the reference fine enough."""
    reference, mass, own, other, _, _ = sums
    tame = (tl.abs(reference) < TAME) & (mass < float("inf")) & (scale > LEAST_SCALE) & (scale < 1 / LEAST_SCALE)
    if STATS > 0:
        tame &= tl.abs(own) < float("inf")
    if STATS > 1:
        tame &= tl.abs(other) < float("inf")
    return tame


@triton.jit
def summary_of(sums, scale, temperature):
    """Return a row's summary. Dividing by the rounded scale undoes its rounding."""
    reference, mass, own, _, greatest, _ = sums
    log_mass = tl.log2(mass * tl.exp2(reference - greatest * scale)) / (scale * temperature)
    entropy = (tl.log2(mass) - own / mass) * LN2
    return greatest, log_mass, greatest / temperature + log_mass, entropy


@triton.jit
def kl_of(p, q):
    _, p_mass, p_own, p_other, _, _ = p
    _, q_mass, _, _, _, _ = q
    kl = ((p_own - p_other) / p_mass - tl.log2(p_mass) + tl.log2(q_mass)) * LN2
    return tl.where(kl < 0, 0.0, kl)


@triton.jit
def summarize(records, segments, scales, temperatures, SEGMENTS: tl.constexpr, STATS: tl.constexpr,
              PAIR: tl.constexpr):  # fmt: skip
    """Return the summaries, the divergences, and whether the exact pass must compute them.

    The divergences of a pair are KL(x || y), KL(y || x) and the excess of x's peak. Without the sums own and
    other of a row (STATS) there is no entropy of it and no KL from it.
    """
    y_records = records + FIELDS * SEGMENTS
    p_scale, q_scale = scales
    p = row_sums(records, y_records, segments, p_scale, q_scale, SEGMENTS, STATS[0])
    x, tame = summary_of(p, p_scale, temperatures[0]), is_tame(p, p_scale, STATS[0])
    if PAIR:
        q = row_sums(y_records, records, segments, q_scale, p_scale, SEGMENTS, STATS[1])
        y, tame = summary_of(q, q_scale, temperatures[1]), tame & is_tame(q, q_scale, STATS[1])
        return (x, y), (kl_of(p, q), kl_of(q, p), p[5] * LN2), tame == 0
    else:
        return (x,), (), tame == 0


# --- The exact pass, from the definitions: for NaN, infinities, or values whose differences float32 cannot resolve.


@triton.jit
def summarize_exactly(x_row, y_row, maxima, vocab_size, temperatures, STATS: tl.constexpr):
    """Return the summaries, the divergences as `summarize` does, and whether a row is broken."""
    x_temperature, y_temperature = temperatures
    x, broken = exact_summary(x_row, maxima, 0, vocab_size, x_temperature)
    if y_row is None:
        return (x,), (), broken
    else:
        y, y_broken = exact_summary(y_row, maxima, 1, vocab_size, y_temperature)
        reverse_kl, forward_kl, excess = (tl.zeros([], tl.float64), tl.zeros([], tl.float64), tl.zeros([], tl.float64))
        if STATS[0] > 1:
            reverse_kl, excess = exact_kl(x_row, y_row, x, y, x_temperature, y_temperature, vocab_size)
        if STATS[1] > 1:
            forward_kl, _ = exact_kl(y_row, x_row, y, x, y_temperature, x_temperature, vocab_size)
        return (x, y), (reverse_kl, forward_kl, excess), broken | y_broken


@triton.jit
def exact_logits(row, first, vocab_size):
    ids = first + tl.arange(0, EXACT_BLOCK)
    inside = ids < vocab_size
    return tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float64)


@triton.jit
def exact_summary(row, maxima, SIDE: tl.constexpr, vocab_size, temperature):
    """Return a row's summary and whether it is broken; store NaN among the tile maxima."""
    ROWS: tl.constexpr = EXACT_BLOCK // TILE
    greatest = tl.full([], float("-inf"), tl.float64)
    has_nan = tl.zeros([], tl.int32)
    for first in range(0, vocab_size, EXACT_BLOCK):
        x = tl.reshape(exact_logits(row, first, vocab_size), [ROWS, TILE])
        tile_nan = tl.max((x != x).to(tl.int32), 1)
        maximum = tl.max(tl.where(x != x, float("-inf"), x), 1)
        if maxima is not None:
            stored = tl.where(tile_nan > 0, float("nan"), maximum)
            tile = tl.arange(0, ROWS) + first // TILE
            # Through float32: Triton's interpreter turns a NaN into a number from float64 to bfloat16.
            tl.store(maxima + 2 * tile + SIDE, stored.to(tl.float32).to(maxima.dtype.element_ty))
        greatest = tl.maximum(greatest, tl.max(maximum, 0))
        has_nan = tl.maximum(has_nan, tl.max(tile_nan, 0))
    tl.debug_barrier()  # a selection reads the maxima
    broken = (has_nan > 0) | (tl.abs(greatest) == float("inf"))
    masses, owns = tl.zeros([EXACT_BLOCK], tl.float64), tl.zeros([EXACT_BLOCK], tl.float64)
    for first in range(0, vocab_size, EXACT_BLOCK):
        d = (exact_logits(row, first, vocab_size) - greatest) / temperature
        e = tl.exp(d)
        masses += e
        owns += tl.where(e > 0, e * d, 0.0)
    mass = tl.sum(masses, 0)
    nan = tl.full([], float("nan"), tl.float64)
    log_mass = tl.log(mass)
    lse = tl.where(broken, tl.where(has_nan > 0, nan, greatest), greatest / temperature + log_mass)
    reference = tl.where(broken, nan, greatest)
    return (reference, log_mass, lse, tl.where(broken, nan, log_mass - tl.sum(owns, 0) / mass)), broken


@triton.jit
def exact_kl(p_row, q_row, p, q, p_temperature, q_temperature, vocab_size):
    """Return KL(p || q), +inf if an id has log q = -inf < log p, even if p is 0; and the excess of p's greatest."""
    sums = tl.zeros([EXACT_BLOCK], tl.float64)
    of_peak = tl.full([], float("-inf"), tl.float64)
    for first in range(0, vocab_size, EXACT_BLOCK):
        x = exact_logits(p_row, first, vocab_size)
        log_p = logprob(x, p, p_temperature)
        log_q = logprob(exact_logits(q_row, first, vocab_size), q, q_temperature)
        of_peak = tl.maximum(of_peak, tl.max(tl.where(x == p[0], log_p - log_q, float("-inf")), 0))
        mass = tl.exp(log_p)
        term = tl.where(mass == 0, 0.0, mass * (log_p - log_q))
        term = tl.where(log_q == float("-inf"), float("inf"), term)
        sums += tl.where(log_p == float("-inf"), 0.0, term)
    kl = tl.sum(sums, 0)
    kl = tl.where(kl < 0, 0.0, kl)
    return kl, of_peak - kl
