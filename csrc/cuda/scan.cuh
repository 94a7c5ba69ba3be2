// Along a response: C, R, L and E (Prune-OPD eq. 8-10, 12), by one block.
#pragma once

#include "../math/reward.h"
#include "../math/scan.h"
#include "launch.h"
#include "views.cuh"
#include "warp.cuh"

namespace pruneopd::cuda {

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarpSize;
/// Positions that a block scans at a time.
constexpr int kScanChunk = 4 * kScanThreads;

struct Scan {
  DeviceView mask, drift;  // drift is an argument, or what another kernel has written
  DeviceResponses responses;
  double w_drop, w_base, eps;
  DeviceView drift_count;
  ScanOutputs out;
  DeviceView reward_weight = View();  // what multiplies the rewards in place of L
  double* unweighted = nullptr;       // rewards [positions, k]; null: there are none
  float* rewards = nullptr;           // the same, weighted
  int k = 0;

  Scan(const View& mask, const View& drift, const Responses& responses, const ScanRule& rule, const ScanOutputs& out)
      : mask(mask),
        drift(drift),
        responses(responses),
        w_drop(rule.w_drop),
        w_base(rule.w_base),
        eps(rule.eps),
        drift_count(rule.drift_count),
        out(out) {}
};

/// The beginning of the shared memory, whatever lay there before.
struct ScanMemory {
  int32_t drifts[2][kScanWarps];  // of the warps' positions; two, so that one barrier a chunk is enough
  int32_t effective_length;
  double weights[kScanChunk];  // of the rewards

  __device__ static ScanMemory& get() { return *reinterpret_cast<ScanMemory*>(shared_memory); }
};

/// Multiplies the rewards of `count` positions from `first` on by the weights: vectors of 4 where they are aligned, as
/// in tensors of PyTorch, of which a thread loads several before it stores one.
__device__ __forceinline__ void weight_rewards(const Scan& scan, int64_t first, int count) {
  constexpr int kIds = 4, kAhead = 2, kStep = kIds * kScanThreads;
  const double* const weights = ScanMemory::get().weights;
  const double* const unweighted = scan.unweighted + first * scan.k;
  float* const rewards = scan.rewards + first * scan.k;
  const int end = count * scan.k, thread = threadIdx.x;
  const bool is_aligned = reinterpret_cast<uintptr_t>(scan.rewards) % sizeof(uint4) == 0;
  const int begin = is_aligned ? min(static_cast<int>(-(first * scan.k) & (kIds - 1)), end) : end;
  const int stop = begin + (end - begin) / kIds * kIds;
#pragma unroll 1
  for (int i = thread; i < begin + end - stop; i += kScanThreads) {
    const int slot = i < begin ? i : stop + i - begin;
    rewards[slot] = weighted_reward(weights[slot / scan.k], __ldcg(unweighted + slot));
  }
#pragma unroll 1
  for (int slot = begin + thread * kIds; slot < stop; slot += kAhead * kStep) {
    uint4 loaded[kAhead][2];
#pragma unroll
    for (int i = 0; i < 2 * kAhead; ++i) {
      const int at = slot + i / 2 * kStep;
      if (at < stop) loaded[i / 2][i % 2] = __ldcg(reinterpret_cast<const uint4*>(unweighted + at) + i % 2);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = slot + i * kStep;
      if (at >= stop) break;
      double four[kIds];
      __builtin_memcpy(four, loaded[i], sizeof four);
      int position = at / scan.k, j = at % scan.k;
      uint32_t weighted[kIds];
#pragma unroll
      for (int e = 0; e < kIds; ++e) {
        weighted[e] = float_bits(weighted_reward(weights[position], four[e]));
        if (++j == scan.k) {
          j = 0;
          ++position;
        }
      }
      *reinterpret_cast<uint4*>(rewards + at) = {weighted[0], weighted[1], weighted[2], weighted[3]};
    }
  }
}

/// The positions [begin, end) of response b. What other blocks have written is read past the L1 cache.
__device__ __forceinline__ void scan_response(const Scan& scan, int64_t b) {
  ScanMemory& memory = ScanMemory::get();
  constexpr int kRounds = kScanChunk / kScanThreads, kWarpPositions = kRounds * kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t begin = scan.responses.begin(b), end = scan.responses.end(b);
  int64_t carried = scan.drift_count ? scan.drift_count.id(b) : 0;
  int32_t effective = 0;
  if (threadIdx.x == 0) memory.effective_length = 0;

  int parity = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kScanChunk, parity ^= 1) {
    const int64_t first = chunk + warp * kWarpPositions + lane;
    unsigned valid[kRounds], drifting[kRounds];  // a bit a position
    int32_t drifts = 0;                          // of this warp
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const int64_t n = first + round * kWarpSize;
      const bool is_valid = n < end && scan.mask.flag(n);
      put(valid, round, __ballot_sync(kWholeWarp, is_valid));
      const unsigned ballot = __ballot_sync(kWholeWarp, is_valid && scan.drift.flag(n));
      put(drifting, round, ballot);
      drifts += __popc(ballot);
    }
    if (lane == 0) memory.drifts[parity][warp] = drifts;
    __syncthreads();
    int32_t of_chunk = 0, of_warps_before = 0;
#pragma unroll
    for (int other = 0; other < kScanWarps; ++other) {
      if (other == warp) of_warps_before = of_chunk;
      of_chunk += memory.drifts[parity][other];
    }
    int64_t count_before = carried + of_warps_before;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const int64_t n = first + round * kWarpSize;
      const bool is_valid = pick(valid, round) >> lane & 1;
      const unsigned ballot = pick(drifting, round);
      if (n < end) {
        const unsigned here_included = 0xffffffffu >> (kWarpSize - 1 - lane);
        const int32_t count = stored_count(count_before + __popc(ballot & here_included));
        const double reliability = reliability_of(count, scan.w_drop);
        const float rounded = is_valid ? static_cast<float>(weight_of(reliability, scan.w_base)) : 0;
        memory.weights[n - chunk] = is_valid && scan.reward_weight ? scan.reward_weight.real(n) : rounded;
        scan.out.drift_count[n] = count;
        scan.out.reliability[n] = is_valid ? static_cast<float>(reliability) : 0;
        scan.out.weight[n] = rounded;
        effective += is_valid && is_effective(reliability, scan.eps);
      }
      count_before += __popc(ballot);
    }
    if (scan.rewards) {
      __syncthreads();
      weight_rewards(scan, chunk, static_cast<int>(min(int64_t{kScanChunk}, end - chunk)));
    }
    carried += of_chunk;
  }
  effective = __reduce_add_sync(kWholeWarp, effective);
  __syncthreads();
  if (lane == 0) atomicAdd(&memory.effective_length, effective);
  __syncthreads();
  if (threadIdx.x == 0) scan.out.effective_length[b] = memory.effective_length;
}

/// Scans every response, a block each.
void scan_responses(const Scan& scan, const Queue& queue);

}  // namespace pruneopd::cuda
