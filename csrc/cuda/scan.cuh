// Along a response: C, R, L and E (Prune-OPD eq. 8-10, 12), by one block.
#pragma once

#include "../math/reward.h"
#include "../math/scan.h"
#include "launch.h"
#include "views.cuh"
#include "warp.cuh"

namespace pruneopd::cuda {

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarpSize;

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

  __device__ static ScanMemory& get() { return *reinterpret_cast<ScanMemory*>(shared_memory); }
};

/// The positions [begin, end) of response b. What other blocks have written is read past the L1 cache.
__device__ __forceinline__ void scan_response(const Scan& scan, int64_t b) {
  ScanMemory& memory = ScanMemory::get();
  constexpr int kRounds = 4, kWarpPositions = kRounds * kWarpSize, kChunk = kScanWarps * kWarpPositions;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t begin = scan.responses.begin(b), end = scan.responses.end(b);
  int64_t carried = scan.drift_count ? scan.drift_count.id(b) : 0;
  int32_t effective = 0;
  if (threadIdx.x == 0) memory.effective_length = 0;

  int parity = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kChunk, parity ^= 1) {
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
      double weight = 0;  // of the rewards
      if (n < end) {
        const unsigned here_included = 0xffffffffu >> (kWarpSize - 1 - lane);
        const int32_t count = stored_count(count_before + __popc(ballot & here_included));
        const double reliability = reliability_of(count, scan.w_drop);
        const float rounded = is_valid ? static_cast<float>(weight_of(reliability, scan.w_base)) : 0;
        weight = is_valid && scan.reward_weight ? scan.reward_weight.real(n) : rounded;
        scan.out.drift_count[n] = count;
        scan.out.reliability[n] = is_valid ? static_cast<float>(reliability) : 0;
        scan.out.weight[n] = rounded;
        effective += is_valid && is_effective(reliability, scan.eps);
      }
      count_before += __popc(ballot);
      if (scan.rewards) {  // of the 32 positions of this round, which lie side by side
        const int64_t start = n - lane;
        const int positions = static_cast<int>(min(int64_t{kWarpSize}, end - start));
        for (int i = lane; i - lane < positions * scan.k; i += kWarpSize) {
          const double of_reward = __shfl_sync(kWholeWarp, weight, i / scan.k % kWarpSize);
          const int64_t slot = start * scan.k + i;
          if (i < positions * scan.k) scan.rewards[slot] = weighted_reward(of_reward, __ldcg(scan.unweighted + slot));
        }
      }
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
