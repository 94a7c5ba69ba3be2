// From what the pass left to what there is to say about the rows: sums, log-sum-exp, entropies, divergences.
#pragma once

#include "../math/state.h"
#include "selection.cuh"

namespace pruneopd::cuda {

/// Values that a block adds up at once.
constexpr int kMostTerms = 4;

/// The greatest logit of a row, NaN if there is one, and a tile that holds it.
struct Peak {
  float logit;
  int tile;

  __device__ bool broken() const { return !(fabsf(logit) < INFINITY); }
};

/// The summaries' part of the shared memory.
template <int kSides>
struct Summaries {
  Peak peaks[kSides];
  RowSums sums[kSides];
  bool partner_misses[kSides];
  double partner_origins[kSides];  // what sums.other counts the partner's d from, unless set_peak_apart has moved it
  RowSummary rows[kSides];
  double divergences[kSides];           // of this row from the other: reverse, forward
  double peak_excess;                   // of row 0, where it has a peak: see DivergenceState
  float beside_peak;                    // row 1's logit there
  double of_warps[kWarps][kMostTerms];  // for sum_over_block
};

/// 2^d for a whole d <= 0, in float64.
__device__ __forceinline__ double exp2_whole(double d) {
  const auto bits = static_cast<uint64_t>(static_cast<int64_t>(d < -1023 ? -1023 : d) + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}

/// Adds up values of all threads; every thread gets the sums, in an order that is always the same.
template <int kCount>
__device__ __forceinline__ void sum_over_block(double (&values)[kCount], double (&of_warps)[kWarps][kMostTerms]) {
  static_assert(kCount <= kMostTerms);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(values[i]);
    if (thread_in_block() % kWarpSize == 0) of_warps[thread_in_block() / kWarpSize][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) values[i] += of_warps[warp][i];
  }
  __syncthreads();
}

/// The peak from the short orders of the tile maxima, by one warp.
template <class V>
__device__ __forceinline__ Peak find_peak(const uint32_t* orders, int count, int lane) {
  Candidate greatest = 0;
  for (int tile = lane; tile < count; tile += kWarpSize) {
    const Candidate candidate = static_cast<uint64_t>(orders[tile]) << 32 | static_cast<uint32_t>(~tile);
    greatest = max(greatest, candidate);
  }
  greatest = warp_max(greatest);
  return {logit_of(whole_order<V>(static_cast<uint32_t>(greatest >> 32))), static_cast<int>(candidate_id(greatest))};
}

/// The sums of a row from its records, but for the one at `left_out`; by one warp. Also where the partner's d are from.
template <bool kStats>
__device__ __forceinline__ void combine(const Record* records, const Record* partner_records, int count, int left_out,
                                        float scale, float partner_scale, int lane, RowSums& sums, bool& partner_misses,
                                        double& partner_origin) {
  float reference = -INFINITY, partner_reference = -INFINITY;
  for (int i = lane; i < count; i += kWarpSize) {
    if (records[i].mass != 0) reference = fmaxf(reference, records[i].reference);
    if (partner_records[i].mass != 0) partner_reference = fmaxf(partner_reference, partner_records[i].reference);
  }
  reference = warp_max(reference);
  partner_reference = warp_max(partner_reference);
  double mass = 0, own = 0, other = 0;
  bool misses = false;
  for (int i = lane; i < count; i += kWarpSize) {
    const Record record = records[i];
    if (record.mass == 0) continue;
    misses |= record.other == -INFINITY;
    if (i == left_out) continue;
    const double shift = static_cast<double>(record.reference) - reference, factor = exp2_whole(shift);
    mass += factor * record.mass;
    if constexpr (kStats) {
      const double partner_shift = static_cast<double>(partner_records[i].reference) - partner_reference;
      own += factor * (record.own + shift * record.mass);
      if (record.other != -INFINITY) other += factor * (record.other + partner_shift * record.mass);
    }
  }
  mass = warp_sum(mass);
  if constexpr (kStats) {
    own = warp_sum(own);
    other = warp_sum(other);
  }
  misses = __any_sync(kWholeWarp, misses);
  if (lane != 0) return;
  sums.reference = static_cast<double>(reference) / scale;
  sums.scale = scale;
  sums.mass = mass;
  sums.own = own / scale;
  sums.other = other / partner_scale;
  partner_misses = misses;
  partner_origin = static_cast<double>(partner_reference) / partner_scale;
}

/// Rows whose logits, over the temperature, lie farther out than this in log2 units have lost digits in the pass. So
/// has a pair of rows with a term that takes float64: see Record.
constexpr double kFarthestExact = 0x1p20;

__device__ __forceinline__ bool has_lost_digits(const RowSums& sums) {
  return !(sums.mass > 0 && sums.mass < INFINITY && sums.other == sums.other &&
           fabs(sums.reference * sums.scale) < kFarthestExact);
}

/// Whether one token has most of the mass: more rows than those of DivergenceState::is_peaked.
__device__ __forceinline__ bool has_peak(const RowSums& sums, const Peak& peak) {
  return 1.6 * exp2(sums.scale * (peak.logit - sums.reference)) > sums.mass;
}

/// Where one token has most of the mass, the rest of it, which is all there is to the entropy, may be less than the
/// rounding of a float32 that holds the peak: sums again the record that does, relative to the peak, in float64. By the
/// block.
template <class T, bool kStats, int kSides>
__device__ __forceinline__ void set_peak_apart(const typename Vectors<T>::Row& row,
                                               const typename Vectors<T>::Row& partner, const Record* records,
                                               const Record* partner_records, int record_count, int side,
                                               Summaries<kSides>& out) {
  RowSums &sums = out.sums[side], &partner_sums = out.sums[kSides - 1 - side];
  using C = Cut<T>;
  const Peak peak = out.peaks[side];
  if (!__syncthreads_or(thread_in_block() == 0 && has_peak(sums, peak))) return;
  const auto scale = static_cast<float>(sums.scale), partner_scale = static_cast<float>(partner_sums.scale);
  const int peak_id = peak.tile * C::kTile;
  const int unit = peak_id / C::kUnit, warp = peak_id % C::kStep / C::kWarp, lane = thread_in_block() % kWarpSize;
  __syncthreads();  // all have read the sums
  if (thread_in_block() < kWarpSize)
    combine<kStats>(records, partner_records, record_count, unit * kWarps + warp, scale, partner_scale, lane, sums,
                    out.partner_misses[side], out.partner_origins[side]);
  double added[3] = {};  // mass, own, other
#pragma unroll 1
  for (int i = thread_in_block(); i < C::kWarp * C::kUnitSteps; i += kThreads) {
    const int id = unit * C::kUnit + i / C::kWarp * C::kStep + warp * C::kWarp + i % C::kWarp;
    if (id >= row.vocab_size) continue;
    const float d = row.logit(id) - peak.logit;
    const float e = exp2_approximately(d * scale);
    added[0] += e;
    if (kStats && e != 0) added[1] += static_cast<double>(e) * d;
    if constexpr (kStats && kSides == 2) {
      const float y = partner.logit(id);
      if (e != 0 && y != -INFINITY) added[2] += e * (y - partner_sums.reference);
    }
  }
  sum_over_block(added, out.of_warps);
  if (thread_in_block() == 0) {
    const double shift = sums.reference - peak.logit, factor = exp2(shift * sums.scale);
    if constexpr (kStats) sums.own = factor * (sums.own + shift * sums.mass) + added[1];
    if constexpr (kStats && kSides == 2) {  // a row alone is its own partner
      sums.other += (out.partner_origins[side] - partner_sums.reference) * sums.mass;
      sums.other = factor * sums.other + added[2];
      partner_sums.other += shift * partner_sums.mass;
    }
    sums.mass = factor * sums.mass + added[0];
    sums.reference = peak.logit;
  }
  __syncthreads();
}

/// The summary of a row that has lost digits, by its definition in float64. By the block.
template <class Row, int kSides>
__device__ __forceinline__ RowSummary summarize_exactly(const Row& row, float greatest, double temperature,
                                                        Summaries<kSides>& out) {
  double sums[2] = {};  // mass, own
#pragma unroll 1
  for (int id = thread_in_block(); id < row.vocab_size; id += kThreads) {
    const double t = (static_cast<double>(row.logit(id)) - greatest) / temperature, e = exp(t);
    sums[0] += e;
    if (e > 0) sums[1] += e * t;
  }
  sum_over_block(sums, out.of_warps);
  return RowSummary(greatest, log(sums[0]), sums[1] / sums[0], temperature);
}

/// KL(p‖q) by its definition. By the block.
template <class Row, int kSides>
__device__ __forceinline__ double diverge_exactly(const Row& p_row, const Row& q_row, const RowSummary& p,
                                                  const RowSummary& q, double p_temperature, double q_temperature,
                                                  Summaries<kSides>& out) {
  double sums[1] = {};
#pragma unroll 1
  for (int id = thread_in_block(); id < p_row.vocab_size; id += kThreads) {
    const double log_p = p.logprob(p_row.logit(id), p_temperature), log_q = q.logprob(q_row.logit(id), q_temperature);
    if (log_p == -INFINITY) continue;
    const double mass = exp(log_p);
    if (log_q == -INFINITY)
      sums[0] = INFINITY;
    else if (mass > 0)
      sums[0] += mass * (log_p - log_q);
  }
  sum_over_block(sums, out.of_warps);
  return sums[0] < 0 ? 0 : sums[0];
}

/// log p - log q - KL(p‖q) at the peak of row 0, if it has one. `p` and `q` are summaries. By the block.
template <class T>
__device__ __forceinline__ void set_peak_excess(const typename Vectors<T>::Row& p_row,
                                                const typename Vectors<T>::Row& q_row, double p_temperature,
                                                double q_temperature, bool by_definition, Summaries<2>& out) {
  using C = Cut<T>;
  const Peak peak = out.peaks[0];
  const RowSummary &p = out.rows[0], &q = out.rows[1];
  const bool peaked = p.logprob(peak.logit, p_temperature) > -0.45;  // log(1.5) is .41, log(1.6) .47
  if (peaked)
    for (int i = thread_in_block(); i < C::kTile; i += kThreads) {
      const int id = peak.tile * C::kTile + i;
      if (id < p_row.vocab_size && p_row.logit(id) == peak.logit) out.beside_peak = q_row.logit(id);
    }
  __syncthreads();
  if (thread_in_block() != 0) return;
  if (!peaked)
    out.peak_excess = 0;
  else if (by_definition)
    out.peak_excess =
        p.logprob(peak.logit, p_temperature) - q.logprob(out.beside_peak, q_temperature) - out.divergences[0];
  else
    out.peak_excess =
        excess_of_peak(out.sums[0], p_temperature, q_temperature, out.beside_peak - out.sums[1].reference);
}

}  // namespace pruneopd::cuda
