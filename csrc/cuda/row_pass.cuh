// The pass over the logits of one position: its row, or both rows in step, each logit read once.
//
// A row is cut into units, and each warp sums its share of a unit on its own, relative to references of its own. So the
// sums depend on nothing but the row: a unit gives the same Record whichever block takes it and whatever it did before.
#pragma once

#include "../math/softmax.h"
#include "rows.cuh"
#include "warp.cuh"

namespace pruneopd::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
/// Threads that hold a tile between them, the contiguous ids whose maximum is kept for the selection.
constexpr int kTileThreads = 8;

/// What is summed besides the masses. Two rows: 0 is the student's, 1 the teacher's.
enum class Stats {
  kNone,
  kReverseKl,  // what KL(0‖1) takes
  kAll,        // and the entropies and KL(1‖0)
};

/// How a row of logits T is cut up.
template <class T>
struct Cut {
  static constexpr int kTile = kTileThreads * Vectors<T>::kCount * Vectors<T>::kIds;
  static constexpr int kWarp = kTile * (kWarpSize / kTileThreads);  // of one step
  static constexpr int kStep = kWarp * kWarps;
  static constexpr int kUnitSteps = 16384 / kStep;
  static constexpr int kUnit = kStep * kUnitSteps;

  PRUNEOPD_FORMULA static int tiles(int64_t vocab_size) { return static_cast<int>((vocab_size + kTile - 1) / kTile); }
  PRUNEOPD_FORMULA static int units(int64_t vocab_size) { return static_cast<int>((vocab_size + kUnit - 1) / kUnit); }
};

/// The sums of one warp over its share of a unit, as in RowSums, but d is in log2 units and the reference is whole.
struct alignas(16) Record {
  float reference, mass, own, other;  // mass 0: no finite logit; other -inf: some id is -inf in the other row only
};

/// 2^d for a whole d <= 0.
__device__ __forceinline__ float exp2_whole(float d) {
  return bits_float(static_cast<uint32_t>(static_cast<int>(d < -127 ? -127 : d) + 127) << 23);
}

/// One thread's sums over one row, relative to a reference that follows its maximum.
template <bool kStats>
struct Side {
  /// A reference may lag behind the maximum by this much, in log2 units: where terms d * exp2(d) cancel, little; else
  /// as long as nothing overflows.
  static constexpr float kHeadroom = kStats ? 2 : 20;
  /// Rows whose references would lie beyond are summed in float64: see summary.cuh.
  static constexpr float kFarthest = 0x1p24f;
  static constexpr int kNone = -(1 << 30);

  float scale = 0;  // log2(e) / temperature
  float reference = 0, limit = -INFINITY;
  float mass = 0, own = 0, other = 0;
  bool partner_misses = false;

  __device__ void start_unit() {
    reference = mass = own = other = 0;
    limit = -INFINITY;
    partner_misses = false;
  }
  __device__ float distance(float logit) const { return fmaf(logit, scale, -reference); }

  /// Moves the reference up to a logit; a NaN or +inf, which break the row, move it somewhere.
  __device__ void follow(float peak, Side& partner) {
    const float to = fminf(fmaxf(ceilf(peak * scale), -kFarthest), kFarthest);
    const float shift = reference - to, factor = this->factor(to);
    if constexpr (kStats) {
      own = factor * fmaf(shift, mass, own);
      other *= factor;
      partner.other = fmaf(shift, partner.mass, partner.other);
    }
    mass *= factor;
    reference = to;
    limit = (to + kHeadroom) / scale;
  }

  /// Where the reference goes when the warp's threads agree on the largest; nowhere if they have no finite logit.
  __device__ float agreed_reference() const {
    const int mine = limit == -INFINITY ? kNone : static_cast<int>(reference);
    const int top = __reduce_max_sync(kWholeWarp, mine);
    return top == kNone ? reference : static_cast<float>(top);
  }

  __device__ float factor(float to) const { return limit == -INFINITY ? 0 : exp2_whole(reference - to); }
};

struct StepSums {
  float mass = 0, own = 0, other = 0;

  template <bool kStats>
  __device__ void add_to(Side<kStats>& side) const {
    side.mass += mass;
    side.own += own;
    side.other += other;
  }
};

/// A vector is summed by halves: in a row of equal logits all roundings go the same way.
template <class T>
__device__ __forceinline__ void sum_masses(const Vectors<T>& vectors, Side<false>& side) {
#pragma unroll
  for (int j = 0; j < Vectors<T>::kCount; ++j) {
    float x[Vectors<T>::kIds];
    vectors.logits(j, x);
#pragma unroll
    for (float& one : x) one = exp2_approximately(side.distance(one));
#pragma unroll
    for (int half = Vectors<T>::kIds / 2; half; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    side.mass += x[0];
  }
}

/// Both rows of a step. Only where no logit is -inf: nothing may be multiplied by that.
template <class T>
__device__ __forceinline__ void sum_step(const Vectors<T>& xs, const Vectors<T>& ys, const Side<true>& student,
                                         const Side<true>& teacher, StepSums& s, StepSums& t) {
#pragma unroll
  for (int j = 0; j < Vectors<T>::kCount; ++j) {
    float x[Vectors<T>::kIds], y[Vectors<T>::kIds];
    xs.logits(j, x);
    ys.logits(j, y);
#pragma unroll
    for (int i = 0; i < Vectors<T>::kIds; ++i) {
      const float dx = student.distance(x[i]), dy = teacher.distance(y[i]);
      const float ex = exp2_approximately(dx), ey = exp2_approximately(dy);
      s.mass += ex;
      t.mass += ey;
      s.own = fmaf(ex, dx, s.own);
      t.own = fmaf(ey, dy, t.own);
      s.other = fmaf(ex, dy, s.other);
      t.other = fmaf(ey, dx, t.other);
    }
  }
}

/// The same for logits of any kind, vector by vector: it is rare, and unrolled it would take the registers of the
/// other.
template <class T>
__device__ __forceinline__ void sum_step_carefully(const Vectors<T>& xs, const Vectors<T>& ys, Side<true>& student,
                                                   Side<true>& teacher, StepSums& s, StepSums& t) {
#pragma unroll 1
  for (int j = 0; j < Vectors<T>::kCount; ++j) {
    float x[Vectors<T>::kIds], y[Vectors<T>::kIds];
    Vectors<T>::logits(pick(xs.vectors, j), x);
    Vectors<T>::logits(pick(ys.vectors, j), y);
#pragma unroll
    for (int i = 0; i < Vectors<T>::kIds; ++i) {
      const float dx = student.distance(x[i]), dy = teacher.distance(y[i]);
      const float ex = exp2_approximately(dx), ey = exp2_approximately(dy);
      const bool x_is_out = x[i] == -INFINITY, y_is_out = y[i] == -INFINITY;
      s.mass += ex;
      t.mass += ey;
      if (ex != 0) s.own = fmaf(ex, dx, s.own);
      if (ey != 0) t.own = fmaf(ey, dy, t.own);
      if (ex != 0 && !y_is_out) s.other = fmaf(ex, dy, s.other);
      if (ey != 0 && !x_is_out) t.other = fmaf(ey, dx, t.other);
      student.partner_misses |= y_is_out && !x_is_out;
      teacher.partner_misses |= x_is_out && !y_is_out;
    }
  }
}

/// What is not asked for the compiler leaves out.
template <Stats kStats, class T>
__device__ __forceinline__ void sum_all(const Vectors<T>& xs, const Vectors<T>& ys, Side<true>& student,
                                        Side<true>& teacher) {
  StepSums s, t;
  sum_step(xs, ys, student, teacher, s, t);
  float all = s.own + s.other;
  if constexpr (kStats == Stats::kAll) all = all + t.own + t.other;
  if (!(fabsf(all) < INFINITY)) {  // some logit is -inf, or worse
    s = t = StepSums();
    sum_step_carefully(xs, ys, student, teacher, s, t);
  }
  s.add_to(student);
  t.add_to(teacher);
}

/// The sums of a warp's threads of one value a side. Each side has a share of the threads, which get its sum.
template <int kSides>
__device__ __forceinline__ float sum_sides(const float (&values)[kSides], int side) {
  static_assert(kSides == 1 || kSides == 2);
  float sum = values[0];
  if constexpr (kSides == 2)
    sum = (side == 0 ? values[0] : values[1]) +
          __shfl_xor_sync(kWholeWarp, side == 0 ? values[1] : values[0], kWarpSize / 2);
#pragma unroll
  for (int apart = kWarpSize / kSides / 2; apart; apart /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, apart);
  return sum;
}

/// The warp's sums over its share of a unit, of one side in the threads of its share.
template <Stats kStats, int kSides>
__device__ __forceinline__ Record reduce(const Side<kStats != Stats::kNone> (&sides)[kSides], int side) {
  float to[kSides], factors[kSides], values[kSides];
#pragma unroll
  for (int i = 0; i < kSides; ++i) {
    to[i] = sides[i].agreed_reference();
    factors[i] = sides[i].factor(to[i]);
    values[i] = factors[i] * sides[i].mass;
  }
  Record record{pick(to, side), sum_sides(values, side), 0, 0};
  if constexpr (kStats != Stats::kNone) {
    constexpr int kSummed = kStats == Stats::kAll ? 2 : 1;
    bool misses[2] = {};
    float others[2] = {};
    values[1] = 0;
#pragma unroll
    for (int i = 0; i < kSummed; ++i) {
      const float partner_shift = sides[1 - i].reference - to[1 - i];
      values[i] = factors[i] * fmaf(sides[i].reference - to[i], sides[i].mass, sides[i].own);
      others[i] = factors[i] * fmaf(partner_shift, sides[i].mass, sides[i].other);
      misses[i] = __any_sync(kWholeWarp, sides[i].partner_misses);
    }
    record.own = sum_sides(values, side);
    record.other = sum_sides(others, side);
    if (pick(misses, side)) record.other = -INFINITY;
  }
  return record;
}

/// Where the pass leaves what it finds: one pointer, for it stays in registers through the pass.
template <int kSides>
struct PassOutputs {
  Record* records;  // [kSides, units * kWarps]
  int tiles, units;

  __device__ float* tile_max() const {  // [kSides, tiles]
    return reinterpret_cast<float*>(records + kSides * kWarps * units);
  }
};

/// The maximum of a tile, which kTileThreads neighbours hold.
__device__ __forceinline__ float tile_max(float max) {
#pragma unroll
  for (int apart = kTileThreads / 2; apart; apart /= 2) max = max_or_nan(max, __shfl_xor_sync(kWholeWarp, max, apart));
  return max;
}

/// The units [begin, end) of the rows, by one block.
template <class T, Stats kStats, int kSides>
__device__ __forceinline__ void pass_units(const typename Vectors<T>::Row (&rows)[kSides],
                                           const float (&scales)[kSides], int begin, int end,
                                           const PassOutputs<kSides>& out) {
  using C = Cut<T>;
  constexpr int kStride = kTileThreads * Vectors<T>::kIds;
  const int tile_of_step = threadIdx.x / kTileThreads, thread_of_tile = threadIdx.x % kTileThreads;
  const int vocab_size = rows[0].vocab_size;
  Side<kStats != Stats::kNone> sides[kSides];
#pragma unroll
  for (int side = 0; side < kSides; ++side) sides[side].scale = scales[side];

  for (int unit = begin; unit < end; ++unit) {
#pragma unroll
    for (int side = 0; side < kSides; ++side) sides[side].start_unit();
    for (int first = unit * C::kUnit; first < min((unit + 1) * C::kUnit, vocab_size); first += C::kStep) {
      const int tile = first / C::kTile + tile_of_step;
      const int id = tile * C::kTile + thread_of_tile * Vectors<T>::kIds, last = first + C::kStep - Vectors<T>::kIds;
      Vectors<T> vectors[kSides];
      float max[kSides];
#pragma unroll
      for (int side = 0; side < kSides; ++side) vectors[side].load(rows[side], id, kStride, first, last);
#pragma unroll
      for (int side = 0; side < kSides; ++side) max[side] = vectors[side].max();
#pragma unroll
      for (int side = 0; side < kSides; ++side)
        if (!(max[side] <= sides[side].limit)) sides[side].follow(max[side], sides[kSides - 1 - side]);
#pragma unroll
      for (int side = 0; side < kSides; ++side) max[side] = tile_max(max[side]);
      if (thread_of_tile == 0 && tile < out.tiles) {
#pragma unroll
        for (int side = 0; side < kSides; ++side) out.tile_max()[side * out.tiles + tile] = max[side];
      }
      if constexpr (kStats != Stats::kNone) {
        sum_all<kStats>(vectors[0], vectors[1], sides[0], sides[1]);
      } else {
#pragma unroll
        for (int side = 0; side < kSides; ++side) sum_masses(vectors[side], sides[side]);
      }
    }
    const int warp = thread_in_block() / kWarpSize, lane = thread_in_block() % kWarpSize;
    const int side = lane / (kWarpSize / kSides);
    const Record record = reduce<kStats>(sides, side);
    if (lane % (kWarpSize / kSides) == 0) out.records[(side * out.units + unit) * kWarps + warp] = record;
  }
}

}  // namespace pruneopd::cuda
