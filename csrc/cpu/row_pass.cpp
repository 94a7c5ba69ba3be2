// Compiled once for each instruction set (PRUNEOPD_ISA); see row_pass.h and simd.h.
#include "row_pass.h"

#include "candidates.h"
#include "steps.h"

namespace pruneopd::PRUNEOPD_ISA {
namespace {

/// A reference may lag behind the maximum by this much, in log2 units: where terms d * exp2(d) cancel, little; else as
/// long as nothing overflows.
constexpr float kHeadroomStats = 2, kHeadroomMass = 20;

/// One row on its way: its sums (RowSums) by lane, relative to a reference that follows the maximum.
struct Side {
  float reference = 0;
  float highest = kNegativeInfinity;  // of all tile maxima so far
  float limit = kNegativeInfinity;    // a tile whose maximum exceeds it is summed again, relative to that maximum
  float scale;
  float lowest;                 // d * scale is not far above -126 there: less has no mass
  bool partner_misses = false;  // some id is -inf in the other row and not in this one
  float peak_partner = 0;       // with sums of both rows, the other row's logit at the last peak
  alignas(64) double mass[kLanes] = {}, own[kLanes] = {}, other[kLanes] = {};

  explicit Side(double temperature) : scale(log2_scale(temperature)), lowest(-125 / scale) {}

  /// Whether the reference must follow the maximum of a tile of this mass: also for a peak that is most of its tile,
  /// and so perhaps of the row. What a distribution like that has of entropy may be less than the error of one exp2,
  /// and the rest of the mass less than the rounding of a float32 that holds the peak: so peaks, at d = 0, are added
  /// apart.
  bool lags_behind(float tile_max, Vec tile_mass) {
    if (tile_max <= highest) return false;
    highest = tile_max;
    if (tile_max > limit) return true;
    return 4 * __builtin_exp2f((tile_max - reference) * scale) > 3 * sum_lanes(tile_mass);
  }

  bool has_finite() const { return limit != kNegativeInfinity; }
  bool is_peak(float logit) const { return logit - reference == 0; }

  /// Moves the reference: d changes by `shift`, the mass by a factor, and with them the sums that hold them.
  void move_reference(float to, float headroom, Side* partner) {
    const bool first = !has_finite();  // nothing has been added yet
    const double shift = static_cast<double>(reference) - to, factor = first ? 0 : __builtin_exp2(shift * scale);
    reference = to;
    limit = to + headroom / scale;
    if (first) return;
    for (int i = 0; i < kLanes; ++i) {
      own[i] = factor * (own[i] + shift * mass[i]);
      mass[i] *= factor;
      other[i] *= factor;
      if (partner) partner->other[i] += shift * partner->mass[i];
    }
  }

  RowSums sums() const {
    RowSums sums{reference, scale};
    for (int i = 0; i < kLanes; ++i) {
      sums.mass += mass[i];
      sums.own += own[i];
      sums.other += other[i];
    }
    return sums;
  }
};

/// Elements after which a tile's sums are begun anew, so that no lane adds more than 16 in a chain, or of a mass 8
/// pairs: where logits tie, their roundings all go the same way.
constexpr int64_t kChain = 16 * kLanes;

/// What is summed of a tile, by lane.
struct TileSums {
  Vec max = broadcast(kNegativeInfinity), mass = broadcast(0), own = broadcast(0), other = broadcast(0);

  PRUNEOPD_INLINE Vec all() const { return mass + (own + other); }
  template <bool kOwn, bool kOther>
  PRUNEOPD_INLINE void add_chain(const TileSums& chain) {
    mass += chain.mass;
    if constexpr (kOwn) own += chain.own;
    if constexpr (kOther) other += chain.other;
  }
  PRUNEOPD_INLINE void accumulate_into(Side& side) const {
    accumulate(mass, side.mass);
    accumulate(own, side.own);
    accumulate(other, side.other);
  }
};

/// What else is seen of a tile of both rows: the sum of products of their d (loses_terms), and whether an id is -inf
/// in one row alone.
struct PairFlags {
  Vec products = broadcast(0);
  uint32_t teacher_misses = 0, student_misses = 0;
};

// ---- One row: its mass, and with kMean its mean. In all that follows kCareful lets -inf in, by which nothing is
// multiplied, and leaves peaks out.

/// Sums `count` elements, whole steps.
template <bool kMean, bool kCareful, class T>
PRUNEOPD_INLINE TileSums sum_tile(const T* row, int64_t count, const Side& side) {
  TileSums sums;
  for (int64_t first = 0; first < count; first += kChain) {
    const int64_t last = first + kChain < count ? first + kChain : count;
    TileSums chain;
    for (int64_t i = first; i < last; i += kStep) {
      prefetch_ahead(row + i);
      Vec x[2], d[2], e[2];
      const Vec scale[2] = {broadcast(side.scale), broadcast(side.scale)};
      load_two<false>(row + i, x);
      for (int j = 0; j < 2; ++j) {
        sums.max = max(x[j], sums.max);
        d[j] = x[j] - broadcast(side.reference);
        if constexpr (!kMean) d[j] = max(broadcast(side.lowest), d[j]);  // NaN stays
      }
      exp2_scaled<!kMean>(d, scale, e);
      for (int j = 0; j < 2; ++j) {
        if constexpr (kCareful) e[j] = where_nonzero(d[j], e[j]);
        if constexpr (kMean && kCareful) chain.own += where_nonzero(e[j], e[j] * d[j]);
        if constexpr (kMean && !kCareful) chain.own = fma(e[j], d[j], chain.own);
      }
      chain.mass += e[0] + e[1];
    }
    sums.add_chain<kMean, false>(chain);
  }
  return sums;
}

/// Adds `count` elements, whole steps. False: something in them is not finite.
template <bool kMean, bool kCareful, class T>
PRUNEOPD_INLINE bool add_tile(const T* row, int64_t count, Side& side, float* tile_max) {
  const auto carefully = [=, &side]() __attribute__((noinline)) {  // rare, and kept out of the loop over tiles
    return add_tile<kMean, true>(row, count, side, tile_max);
  };
  const TileSums sums = sum_tile<kMean, kCareful>(row, count, side);
  *tile_max = max_lane(sums.max);
  if (side.lags_behind(*tile_max, sums.mass)) [[unlikely]] {
    if (*tile_max == __builtin_inff()) return false;
    side.move_reference(*tile_max, kMean ? kHeadroomStats : kHeadroomMass, nullptr);
    return carefully();
  }
  if (!all_finite(sums.mass + sums.own)) [[unlikely]]
    return !kCareful && carefully();
  accumulate(sums.mass, side.mass);
  if constexpr (kMean) accumulate(sums.own, side.own);
  if constexpr (kCareful)
    for (int64_t i = 0; i < count; ++i) side.mass[0] += side.is_peak(to_float(row[i]));
  return true;
}

/// The sums of a whole row and its tile maxima. False: some value needs float64.
template <bool kMean, class T>
bool sum_row(const T* row, int64_t vocab_size, Side& side, float* tile_max) {
  int64_t first = 0;
  for (; first + kTile <= vocab_size; first += kTile)
    if (!add_tile<kMean, false>(row + first, kTile, side, tile_max++)) return false;
  const int64_t rest = vocab_size - first;
  if (rest == 0) return true;
  const Padded<T, kTile> last(row + first, rest);
  return add_tile<kMean, false>(last.data, whole_steps(rest), side, tile_max);
}

// ---- Both rows in step: their divergence, too.

/// Adds one vector of each row, but for the masses, which are returned. kBoth: also what the teacher's mean and
/// divergence take, else the student's alone.
template <bool kBoth, bool kCareful>
PRUNEOPD_INLINE void add_vectors(Vec x, Vec y, const Side& student, const Side& teacher, TileSums& s, TileSums& t,
                                 PairFlags& flags, Vec (&e)[2]) {
  const Vec d[2] = {x - broadcast(student.reference), y - broadcast(teacher.reference)};
  const Vec scale[2] = {broadcast(student.scale), broadcast(teacher.scale)};
  flags.products = fma(d[0], d[1], flags.products);
  exp2_scaled<false>(d, scale, e);
  if constexpr (kCareful)
    for (int side = 0; side < 2; ++side) e[side] = where_nonzero(d[side], e[side]);
  if constexpr (!kCareful) {
    s.own = fma(e[0], d[0], s.own);
    s.other = fma(e[0], d[1], s.other);
    if constexpr (kBoth) {
      t.own = fma(e[1], d[1], t.own);
      t.other = fma(e[1], d[0], t.other);
    }
  } else {
    s.own += where_nonzero(e[0], e[0] * d[0]);
    t.own += where_nonzero(e[1], e[1] * d[1]);
    s.other += where_nonzero(e[0], where_above_negative_infinity(y, e[0] * d[1]));
    t.other += where_nonzero(e[1], where_above_negative_infinity(x, e[1] * d[0]));
    flags.teacher_misses |= only_first_negative_infinity(y, x);
    flags.student_misses |= only_first_negative_infinity(x, y);
  }
}

template <bool kBoth, bool kCareful, class TX, class TY>
PRUNEOPD_INLINE PairFlags sum_tile_pair(const TX* x, const TY* y, int64_t count, const Side& student,
                                        const Side& teacher, TileSums& s, TileSums& t) {
  constexpr bool kInOrder = !std::is_same_v<TX, TY>;  // the two rows must agree
  s = t = TileSums();
  PairFlags flags;
  for (int64_t first = 0; first < count; first += kChain) {
    const int64_t last = first + kChain < count ? first + kChain : count;
    TileSums chain_s, chain_t;
    for (int64_t i = first; i < last; i += kStep) {
      prefetch_ahead(x + i);
      prefetch_ahead(y + i);
      Vec vx[2], vy[2], e[2][2];
      load_two<kInOrder>(x + i, vx);
      load_two<kInOrder>(y + i, vy);
      for (int j = 0; j < 2; ++j) {
        s.max = max(vx[j], s.max);
        t.max = max(vy[j], t.max);
        add_vectors<kBoth, kCareful>(vx[j], vy[j], student, teacher, chain_s, chain_t, flags, e[j]);
      }
      chain_s.mass += e[0][0] + e[1][0];
      chain_t.mass += e[0][1] + e[1][1];
    }
    s.add_chain<true, true>(chain_s);
    t.add_chain<kBoth || kCareful, kBoth || kCareful>(chain_t);
  }
  return flags;
}

/// Adds the peaks of one row to its sums: mass 1 and d = 0 each.
template <class TX, class TY>
void add_peaks(const TX* row, const TY* partner_row, int64_t count, Side& side, const Side& partner) {
  for (int64_t i = 0; i < count; ++i) {
    if (!side.is_peak(to_float(row[i]))) continue;
    side.mass[0] += 1;
    side.peak_partner = to_float(partner_row[i]);
    const double partner_d = static_cast<double>(to_float(partner_row[i])) - partner.reference;
    if (partner_d > -__builtin_inf()) side.other[0] += partner_d;  // else -inf, and known as partner_misses
  }
}

/// Adds `count` elements of both rows, whole steps. False: float32 cannot hold something that they take.
template <bool kBoth, bool kCareful, class TX, class TY>
PRUNEOPD_INLINE bool add_tile_pair(const TX* x, const TY* y, int64_t count, Side& student, Side& teacher,
                                   float* student_max, float* teacher_max) {
  const auto carefully = [=, &student, &teacher]() __attribute__((noinline)) {
    return add_tile_pair<kBoth, true>(x, y, count, student, teacher, student_max, teacher_max);
  };
  TileSums s, t;
  const PairFlags flags = sum_tile_pair<kBoth, kCareful>(x, y, count, student, teacher, s, t);
  *student_max = max_lane(s.max);
  *teacher_max = max_lane(t.max);
  const bool student_lags = student.lags_behind(*student_max, s.mass);
  const bool teacher_lags = teacher.lags_behind(*teacher_max, t.mass);
  if (student_lags || teacher_lags) [[unlikely]] {
    if (*student_max == __builtin_inff() || *teacher_max == __builtin_inff()) return false;
    if (student_lags) student.move_reference(*student_max, kHeadroomStats, &teacher);
    if (teacher_lags) teacher.move_reference(*teacher_max, kHeadroomStats, &student);
    return carefully();
  }
  if (!all_finite(s.all() + t.all())) [[unlikely]]
    return !kCareful && carefully();
  const Vec limit = broadcast(limit_of_products(student.scale, teacher.scale));
  if (!all_below(flags.products, limit)) [[unlikely]]
    if (loses_terms(x, y, count, student.reference, teacher.reference, student.scale, teacher.scale)) return false;
  s.accumulate_into(student);
  t.accumulate_into(teacher);
  if constexpr (kCareful) {
    if (flags.teacher_misses) student.partner_misses = true;
    if (flags.student_misses) teacher.partner_misses = true;
    add_peaks(x, y, count, student, teacher);
    add_peaks(y, x, count, teacher, student);
  }
  return true;
}

/// The sums of both rows and their tile maxima. False: some value needs float64.
template <bool kBoth, class TX, class TY>
bool sum_row_pair(const TX* x, const TY* y, int64_t vocab_size, Side& student, Side& teacher, float* student_max,
                  float* teacher_max) {
  int64_t first = 0;
  for (; first + kTile <= vocab_size; first += kTile)
    if (!add_tile_pair<kBoth, false>(x + first, y + first, kTile, student, teacher, student_max++, teacher_max++))
      return false;
  const int64_t rest = vocab_size - first;
  if (rest == 0) return true;
  const Padded<TX, kTile> last_x(x + first, rest);
  const Padded<TY, kTile> last_y(y + first, rest);
  return add_tile_pair<kBoth, true>(last_x.data, last_y.data, whole_steps(rest), student, teacher, student_max,
                                    teacher_max);
}

// ---- The k best of a row, from its tile maxima.

/// Appends the candidates of row[first, last) whose logit is at least `bound`.
template <class T>
PRUNEOPD_INLINE int64_t collect(const T* row, int64_t first, int64_t last, float bound, Candidate* candidates,
                                int64_t count) {
  const Vec bounds = broadcast(bound);
  int64_t id = first;
  for (; id + 4 * kLanes <= last; id += 4 * kLanes) {
    Vec low[2], high[2];
    load_two<false>(row + id, low);
    load_two<false>(row + id + 2 * kLanes, high);
    if (at_least(max(max(low[0], low[1]), max(high[0], high[1])), bounds) == 0) [[likely]]
      continue;
    uint64_t hits = at_least(load(row + id), bounds);
    hits |= static_cast<uint64_t>(at_least(load(row + id + kLanes), bounds)) << kLanes;
    hits |= static_cast<uint64_t>(at_least(load(row + id + 2 * kLanes), bounds)) << 2 * kLanes;
    hits |= static_cast<uint64_t>(at_least(load(row + id + 3 * kLanes), bounds)) << 3 * kLanes;
    for (; hits; hits &= hits - 1) {
      const int64_t hit = id + __builtin_ctzll(hits);
      candidates[count++] = make_candidate(to_float(row[hit]), static_cast<uint32_t>(hit));
    }
  }
  for (; id < last; ++id) {
    const float logit = to_float(row[id]);
    if (logit >= bound) candidates[count++] = make_candidate(logit, static_cast<uint32_t>(id));
  }
  return count;
}

/// The top-k of a row without NaN, from its tile maxima. The first k tiles by (maximum descending, id ascending) hold
/// all of them: an element of any later tile comes after the k maxima of those.
template <class T>
void select(const T* row, int64_t vocab_size, int64_t k, const float* tile_max, uint64_t* tiles, Candidate* candidates,
            int64_t capacity) {
  // A tile as its maximum at its first id: none of its elements comes before that.
  int64_t visits = (vocab_size + kTile - 1) / kTile;
  for (int64_t i = 0; i < visits; ++i) tiles[i] = make_candidate(tile_max[i], static_cast<uint32_t>(i * kTile));
  Candidate bound = make_candidate(kNegativeInfinity, UINT32_MAX);  // nothing that comes after it is among the k best
  if (visits > k) {
    bound = keep_best(tiles, visits, k) >> 32 << 32;  // any id
    visits = k;
  }

  int64_t count = 0;
  const auto visit = [&](Candidate tile) __attribute__((always_inline)) {
    if (tile < bound) return;
    const int64_t first = candidate_id(tile), end = first + kTile;
    count = collect(row, first, end < vocab_size ? end : vocab_size, candidate_logit(bound), candidates, count);
    if (count >= 2 * k && (count - k >= kTile / 4 || count + kTile > capacity)) {
      bound = keep_best(candidates, count, k);
      count = k;
    }
  };
  // The best tiles first, in order, so that the bound is tight early: where logits ascend, no later tile reaches it.
  constexpr int64_t kLeaders = 16;
  Candidate leaders[kLeaders];
  const Candidate least_leader = visits > kLeaders ? kth_best(tiles, visits, kLeaders) : 0;
  int64_t led = 0;
  for (int64_t i = 0; i < visits; ++i)
    if (tiles[i] >= least_leader) leaders[led++] = tiles[i];
  sort_candidates(leaders, led);
  for (int64_t i = 0; i < led; ++i) visit(leaders[i]);
  for (int64_t i = 0; i < visits; ++i)
    if (tiles[i] < least_leader) visit(tiles[i]);
  if (count > k) keep_best(candidates, count, k);
  sort_candidates(candidates, k);
}

void select(const Row& row, int64_t vocab_size, int64_t k, const float* tile_max, Candidate* candidates,
            const RowScratch& scratch) {
  if (k == 0) return;
  with_logits(row.logits, row.type,
              [&](auto x) { select(x, vocab_size, k, tile_max, scratch.tiles, candidates, scratch.capacity); });
}

RowPairSummary row_pair(const Row& student_row, const Row& teacher_row, int64_t vocab_size, int64_t k, Sums sums,
                        RowScratch& scratch) {
  Side student(student_row.temperature), teacher(teacher_row.temperature);
  float *const student_max = scratch.student_tile_max, *const teacher_max = scratch.teacher_tile_max;
  const auto sum = [&](auto x, auto y) {
    if (sums == Sums::kMass)
      return sum_row<false>(x, vocab_size, student, student_max) && sum_row<false>(y, vocab_size, teacher, teacher_max);
    return sums == Sums::kAll ? sum_row_pair<true>(x, y, vocab_size, student, teacher, student_max, teacher_max)
                              : sum_row_pair<false>(x, y, vocab_size, student, teacher, student_max, teacher_max);
  };
  if (!is_usable_scale(student.scale) || !is_usable_scale(teacher.scale) ||
      !with_logits(student_row, teacher_row, sum) || !student.has_finite() || !teacher.has_finite())
    return row_pair_exact(student_row, teacher_row, vocab_size, k, sums, scratch);
  select(student_row, vocab_size, k, student_max, scratch.student_candidates, scratch);
  select(teacher_row, vocab_size, k, teacher_max, scratch.teacher_candidates, scratch);
  const RowSums p = student.sums(), q = teacher.sums();
  RowPairSummary out{RowSummary(p, student_row.temperature), RowSummary(q, teacher_row.temperature)};
  if (sums == Sums::kMass) return out;
  out.reverse_kl = student.partner_misses ? __builtin_inf() : kl_divergence(p, q);
  out.forward_kl = teacher.partner_misses ? __builtin_inf() : kl_divergence(q, p);
  out.peak_excess = excess_of_peak(p, student_row.temperature, teacher_row.temperature,
                                   static_cast<double>(student.peak_partner) - q.reference);
  return out;
}

RowSummary row(const Row& row, int64_t vocab_size, int64_t k, bool mean, RowScratch& scratch) {
  Side side(row.temperature);
  float* const tile_max = scratch.student_tile_max;
  const auto sum = [&](auto x) {
    return mean ? sum_row<true>(x, vocab_size, side, tile_max) : sum_row<false>(x, vocab_size, side, tile_max);
  };
  if (!is_usable_scale(side.scale) || !with_logits(row.logits, row.type, sum) || !side.has_finite())
    return row_exact(row, vocab_size, k, mean, scratch);
  select(row, vocab_size, k, tile_max, scratch.student_candidates, scratch);
  return RowSummary(side.sums(), row.temperature);
}

int count_equal(const IdBlocks& ids, const int32_t* among, int64_t count) {
  int equal = 0;
  for (int64_t block = 0; block < ids.blocks; ++block) {
    const int32_t* slots = ids.ids + block * IdBlocks::kBlock;
    int32_t hits[IdBlocks::kBlock] = {};
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < IdBlocks::kBlock; ++i) hits[i] += slots[i] == among[j];
    for (int32_t hit : hits) equal += hit;
  }
  return equal;
}

void row_max(const Row& student, const Row& teacher, int64_t vocab_size, float* student_max, float* teacher_max) {
  with_logits(student, teacher, [&](auto x, auto y) {
    const Vec bottom = broadcast(kNegativeInfinity);
    Vec s[2] = {bottom, bottom}, t[2] = {bottom, bottom};
    int64_t i = 0;
    for (; i + kStep <= vocab_size; i += kStep) {
      prefetch_ahead(x + i);
      prefetch_ahead(y + i);
      Vec vx[2], vy[2];
      load_two<false>(x + i, vx);
      load_two<false>(y + i, vy);
      for (int j = 0; j < 2; ++j) {
        s[j] = max(vx[j], s[j]);
        t[j] = max(vy[j], t[j]);
      }
    }
    *student_max = max_lane(max(s[0], s[1]));
    *teacher_max = max_lane(max(t[0], t[1]));
    for (; i < vocab_size; ++i) {
      if (to_float(x[i]) > *student_max) *student_max = to_float(x[i]);
      if (to_float(y[i]) > *teacher_max) *teacher_max = to_float(y[i]);
    }
  });
}

}  // namespace

// gradients.cpp
void softmax_gradient(const Row& row, int64_t vocab_size, const RowState& state, double total, double entropy,
                      void* out);
void divergence_gradient(const Row& student, const Row& teacher, int64_t vocab_size, const DivergenceState& state,
                         double factor, void* out);

extern const RowKernels kRowKernels;
#define PRUNEOPD_TEXT_(x) #x
#define PRUNEOPD_TEXT(x) PRUNEOPD_TEXT_(x)
const RowKernels kRowKernels = {PRUNEOPD_TEXT(PRUNEOPD_ISA), row_pair,    row,    softmax_gradient,
                                divergence_gradient,         count_equal, row_max};

}  // namespace pruneopd::PRUNEOPD_ISA
