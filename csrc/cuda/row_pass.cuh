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
  kAll,        // the entropies, and of two rows KL in both directions
};

/// How a row of logits T is cut up.
template <class T>
struct Cut {
  static constexpr int kTile = kTileThreads * Vectors<T>::kCount * Vectors<T>::kIds;
  static constexpr int kWarp = kTile * (kWarpSize / kTileThreads);  // of one step
  static constexpr int kStep = kWarp * kWarps;
  static constexpr int kUnitSteps = 16384 / kStep;
  static constexpr int kUnit = kStep * kUnitSteps;

  /// A multiple of 4, so that maxima are read 4 at a time.
  PRUNEOPD_FORMULA static int tiles(int64_t vocab_size) {
    return static_cast<int>((vocab_size + 4 * kTile - 1) / (4 * kTile) * 4);
  }
  PRUNEOPD_FORMULA static int units(int64_t vocab_size) { return static_cast<int>((vocab_size + kUnit - 1) / kUnit); }
};

/// The sums of one warp over its share of a unit, as in RowSums, but d is in log2 units and the reference is whole.
struct alignas(16) Record {
  float reference, mass;  // mass 0: no finite logit
  float own, other;       // other -inf: some id is -inf in the other row only; NaN: a term needs float64
};

/// 2^d for a whole d <= 0.
__device__ __forceinline__ float exp2_whole(float d) {
  return bits_float(static_cast<uint32_t>(static_cast<int>(d < -127 ? -127 : d) + 127) << 23);
}

/// One thread's sums over one row, relative to a reference that follows its maximum. A mass has the same bits whatever
/// is summed besides.
struct Side {
  /// A reference may lag behind the maximum by this much, in log2 units: terms d * exp2(d) cancel.
  static constexpr float kHeadroom = 2;
  /// Rows whose references would lie beyond are summed in float64: see summary.cuh.
  static constexpr float kFarthest = 0x1p24f;
  static constexpr float kNone = -2 * kFarthest;  // before there is a finite logit

  float scale = 0;  // log2(e) / temperature
  float reference = kNone, mass = 0, own = 0, other = 0;
  bool partner_misses = false;

  __device__ void start_unit() {
    reference = kNone;
    mass = own = other = 0;
    partner_misses = false;
  }
  __device__ float distance(float logit) const { return fmaf(logit, scale, -reference); }

  /// Moves the reference up to a logit; a NaN or +inf, which break the row, move it somewhere.
  __device__ void follow(float peak, Side& partner) {
    const float to = fminf(fmaxf(ceilf(peak * scale), -kFarthest), kFarthest);
    const float shift = reference - to, factor = this->factor(to);
    own = factor * fmaf(shift, mass, own);
    other *= factor;
    partner.other = fmaf(shift, partner.mass, partner.other);
    mass *= factor;
    reference = to;
  }

  /// Where the reference goes when the warp's threads agree on the largest.
  __device__ float agreed_reference() const {
    return static_cast<float>(__reduce_max_sync(kWholeWarp, static_cast<int>(reference)));
  }

  __device__ float factor(float to) const { return exp2_whole(reference - to); }
};

struct StepSums {
  float mass = 0, own = 0, other = 0;

  __device__ void add_to(Side& side) const {
    side.mass += mass;
    side.own += own;
    side.other += other;
  }
};

/// exp2(d) is 0 from here on, even in float64.
constexpr float kLeast = -1100;

/// Whether a term of exp2(d) and the partner's distance takes float64: the float32 exponential is 0 although the
/// product counts, or a sum of such products may overflow.
__device__ __forceinline__ bool is_beyond(float d, float partner_d) {
  return d > kLeast && partner_d < (d < -125 ? kLeast : -0x1p100f);
}

/// Sums two ids of each row: pairs, because in a row of equal logits all roundings go the same way. kCareful: for
/// logits of any kind, such as -inf, by which nothing may be multiplied.
template <Stats kStats, bool kCareful, int kSides>
__device__ __forceinline__ void sum_pair(const float (&x)[kSides][2], Side (&sides)[kSides], StepSums (&sums)[kSides]) {
  float masses[kSides][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float d[kSides], e[kSides];
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      d[side] = sides[side].distance(x[side][i]);
      e[side] = exp2_approximately(d[side]);
      masses[side][i] = e[side];
      if (kStats != Stats::kNone && (!kCareful || e[side] != 0))
        sums[side].own = fmaf(e[side], d[side], sums[side].own);
    }
    if constexpr (kSides == 2) {
      constexpr int kSummed = kStats == Stats::kAll ? 2 : kStats == Stats::kReverseKl ? 1 : 0;
#pragma unroll
      for (int side = 0; side < kSummed; ++side) {
        const int partner = 1 - side;
        if constexpr (kCareful) {
          const bool is_missing = x[partner][i] == -INFINITY;
          const float factor = is_beyond(d[side], d[partner]) ? NAN : e[side];
          sides[side].partner_misses |= is_missing && x[side][i] != -INFINITY;
          if (factor != 0 && !is_missing) sums[side].other = fmaf(factor, d[partner], sums[side].other);
        } else {
          sums[side].other = fmaf(e[side], d[partner], sums[side].other);
        }
      }
    }
  }
#pragma unroll
  for (int side = 0; side < kSides; ++side) sums[side].mass += masses[side][0] + masses[side][1];
}

/// One step of the rows. The careful way is rare, and unrolled it would take the registers of the other.
template <Stats kStats, class T, int kSides>
__device__ __forceinline__ void sum_step(const Vectors<T> (&vectors)[kSides], Side (&sides)[kSides]) {
  constexpr int kPairs = Vectors<T>::kCount * Vectors<T>::kIds / 2;
  StepSums sums[kSides];
  float least = 0, x[kSides][2];
  if constexpr (kStats != Stats::kNone)
#pragma unroll
    for (int side = 0; side < kSides; ++side)
      least = fminf(least, Vectors<T>::template extreme<true>(vectors[side].vectors) * sides[side].scale);
  if (least > kLeast) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) vectors[side].pair(p, x[side]);
      sum_pair<kStats, false>(x, sides, sums);
    }
  } else {
#pragma unroll 1
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) vectors[side].pair(p, x[side]);
      sum_pair<kStats, true>(x, sides, sums);
    }
  }
#pragma unroll
  for (int side = 0; side < kSides; ++side) sums[side].add_to(sides[side]);
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
__device__ __forceinline__ Record reduce(const Side (&sides)[kSides], int side) {
  float to[kSides], factors[kSides], values[kSides];
#pragma unroll
  for (int i = 0; i < kSides; ++i) {
    to[i] = sides[i].agreed_reference();
    factors[i] = sides[i].factor(to[i]);
    values[i] = factors[i] * sides[i].mass;
  }
  Record record{pick(to, side), sum_sides(values, side), 0, 0};
  if constexpr (kStats != Stats::kNone) {
    constexpr int kSummed = kStats == Stats::kAll ? kSides : 1;
    bool misses[kSides] = {};
    float others[kSides] = {};
    if constexpr (kSummed < kSides) values[1] = 0;
#pragma unroll
    for (int i = 0; i < kSummed; ++i) {
      const int partner = kSides - 1 - i;
      values[i] = factors[i] * fmaf(sides[i].reference - to[i], sides[i].mass, sides[i].own);
      others[i] = factors[i] * fmaf(sides[partner].reference - to[partner], sides[i].mass, sides[i].other);
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
  for (int apart = kTileThreads / 2; apart; apart /= 2) max = extreme(max, __shfl_xor_sync(kWholeWarp, max, apart));
  return max;
}

/// The units [begin, end) of the rows, by one block.
template <class T, Stats kStats, int kSides>
__device__ __forceinline__ void pass_units(const typename Vectors<T>::Row (&rows)[kSides],
                                           const float (&scales)[kSides], int begin, int end,
                                           const PassOutputs<kSides>& out) {
  using C = Cut<T>;
  using V = Vectors<T>;
  constexpr int kStride = kTileThreads * V::kIds;
  const int tile_of_step = threadIdx.x / kTileThreads, thread_of_tile = threadIdx.x % kTileThreads;
  const int vocab_size = rows[0].vocab_size;
  Side sides[kSides];
#pragma unroll
  for (int side = 0; side < kSides; ++side) sides[side].scale = scales[side];

  for (int unit = begin; unit < end; ++unit) {
#pragma unroll
    for (int side = 0; side < kSides; ++side) sides[side].start_unit();
    for (int first = unit * C::kUnit; first < min((unit + 1) * C::kUnit, vocab_size); first += C::kStep) {
      const int tile = first / C::kTile + tile_of_step;
      const int id = tile * C::kTile + thread_of_tile * V::kIds;
      V vectors[kSides];
      float max[kSides];
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        const auto id_of = [&](int j) { return id + j * kStride; };
        if (rows[side].has_around(id, id_of(V::kCount - 1)))
          rows[side].load_inside(id_of, vectors[side].vectors);
        else
          rows[side].load(id_of, vectors[side].vectors);
      }
#pragma unroll
      for (int side = 0; side < kSides; ++side) max[side] = V::template extreme<false>(vectors[side].vectors);
#pragma unroll
      for (int side = 0; side < kSides; ++side)
        if (!(sides[side].distance(max[side]) <= Side::kHeadroom))
          sides[side].follow(max[side], sides[kSides - 1 - side]);
#pragma unroll
      for (int side = 0; side < kSides; ++side) max[side] = tile_max(max[side]);
      if (thread_of_tile == 0 && tile < out.tiles) {
#pragma unroll
        for (int side = 0; side < kSides; ++side) out.tile_max()[side * out.tiles + tile] = max[side];
      }
      sum_step<kStats>(vectors, sides);
    }
    const int warp = thread_in_block() / kWarpSize, lane = thread_in_block() % kWarpSize;
    const int side = lane / (kWarpSize / kSides);
    const Record record = reduce<kStats>(sides, side);
    if (lane % (kWarpSize / kSides) == 0) out.records[(side * out.units + unit) * kWarps + warp] = record;
  }
}

}  // namespace pruneopd::cuda
