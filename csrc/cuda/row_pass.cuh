// The pass over the logits of one position: both rows in step, each logit read once.
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
/// Two rows: 0 is the student's, 1 the teacher's.
constexpr int kSides = 2;

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

  float scale;  // log2(e) / temperature
  float reference = 0, limit = -INFINITY;
  float mass = 0, own = 0, other = 0;
  bool partner_misses = false;

  __device__ explicit Side(float scale) : scale(scale) {}

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

template <class T>
__device__ __forceinline__ void sum_masses(const Vectors<T>& vectors, Side<false>& side) {
#pragma unroll
  for (int j = 0; j < Vectors<T>::kCount; ++j) {
    float x[Vectors<T>::kIds];
    vectors.logits(j, x);
#pragma unroll
    for (int i = 0; i < Vectors<T>::kIds; ++i) side.mass += exp2_approximately(side.distance(x[i]));
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

template <class T>
__device__ __forceinline__ void sum_all(const Vectors<T>& xs, const Vectors<T>& ys, Side<true>& student,
                                        Side<true>& teacher) {
  StepSums s, t;
  sum_step(xs, ys, student, teacher, s, t);
  if (!(fabsf(s.own + s.other + t.own + t.other) < INFINITY)) {  // some logit is -inf, or worse
    s = t = StepSums();
    sum_step_carefully(xs, ys, student, teacher, s, t);
  }
  s.add_to(student);
  t.add_to(teacher);
}

/// The sums of a warp's threads, x in its first half, y in the other.
__device__ __forceinline__ float sum_halves(float x, float y, bool first_half) {
  float sum = (first_half ? x : y) + __shfl_xor_sync(kWholeWarp, first_half ? y : x, kWarpSize / 2);
#pragma unroll
  for (int apart = kWarpSize / 4; apart; apart /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, apart);
  return sum;
}

/// The warp's sums over its share of a unit: the student's in the first half of its threads, the teacher's in the
/// other.
template <bool kStats>
__device__ __forceinline__ Record reduce(const Side<kStats>& student, const Side<kStats>& teacher, bool first_half) {
  const float x_to = student.agreed_reference(), y_to = teacher.agreed_reference();
  const float x_factor = student.factor(x_to), y_factor = teacher.factor(y_to);
  Record record{first_half ? x_to : y_to, sum_halves(x_factor * student.mass, y_factor * teacher.mass, first_half), 0,
                0};
  if constexpr (kStats) {
    const float x_shift = student.reference - x_to, y_shift = teacher.reference - y_to;
    record.own = sum_halves(x_factor * fmaf(x_shift, student.mass, student.own),
                            y_factor * fmaf(y_shift, teacher.mass, teacher.own), first_half);
    record.other = sum_halves(x_factor * fmaf(y_shift, student.mass, student.other),
                              y_factor * fmaf(x_shift, teacher.mass, teacher.other), first_half);
    const bool x_misses = __any_sync(kWholeWarp, student.partner_misses);
    const bool y_misses = __any_sync(kWholeWarp, teacher.partner_misses);
    if (first_half ? x_misses : y_misses) record.other = -INFINITY;
  }
  return record;
}

/// Where the pass leaves what it finds, in shared memory.
struct PassOutputs {
  float* tile_max;  // [kSides, tiles]
  Record* records;  // [kSides, units * kWarps]
  int tiles, units;
};

/// The maximum of a tile, which kTileThreads neighbours hold.
__device__ __forceinline__ float tile_max(float max) {
#pragma unroll
  for (int apart = kTileThreads / 2; apart; apart /= 2) max = max_or_nan(max, __shfl_xor_sync(kWholeWarp, max, apart));
  return max;
}

/// The units [begin, end) of both rows, by one block.
template <class T, bool kStats>
__device__ __forceinline__ void pass_units(const typename Vectors<T>::Row& student_row,
                                           const typename Vectors<T>::Row& teacher_row, float student_scale,
                                           float teacher_scale, int begin, int end, const PassOutputs& out) {
  using C = Cut<T>;
  constexpr int kStride = kTileThreads * Vectors<T>::kIds;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int tile_of_step = threadIdx.x / kTileThreads, thread_of_tile = threadIdx.x % kTileThreads;
  const int vocab_size = student_row.vocab_size;
  const bool first_half = lane < kWarpSize / 2;
  Side<kStats> student(student_scale), teacher(teacher_scale);

  for (int unit = begin; unit < end; ++unit) {
    student.start_unit();
    teacher.start_unit();
    for (int first = unit * C::kUnit; first < min((unit + 1) * C::kUnit, vocab_size); first += C::kStep) {
      const int tile = first / C::kTile + tile_of_step;
      const int id = tile * C::kTile + thread_of_tile * Vectors<T>::kIds, last = first + C::kStep - Vectors<T>::kIds;
      Vectors<T> xs, ys;
      xs.load(student_row, id, kStride, first, last);
      ys.load(teacher_row, id, kStride, first, last);
      const float x_max = xs.max(), y_max = ys.max();
      if (!(x_max <= student.limit)) student.follow(x_max, teacher);
      if (!(y_max <= teacher.limit)) teacher.follow(y_max, student);
      const float x_tile_max = tile_max(x_max), y_tile_max = tile_max(y_max);
      if (thread_of_tile == 0 && tile < out.tiles) {
        out.tile_max[tile] = x_tile_max;
        out.tile_max[out.tiles + tile] = y_tile_max;
      }
      if constexpr (kStats) {
        sum_all(xs, ys, student, teacher);
      } else {
        sum_masses(xs, student);
        sum_masses(ys, teacher);
      }
    }
    const Record record = reduce(student, teacher, first_half);
    if (lane % (kWarpSize / 2) == 0) out.records[((first_half ? 0 : out.units) + unit) * kWarps + warp] = record;
  }
}

}  // namespace pruneopd::cuda
