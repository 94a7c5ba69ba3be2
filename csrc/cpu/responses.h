// The scan along the responses, shared by the three operators that have one.
#pragma once

#include <algorithm>

#include "../math/scan.h"
#include "row_pass.h"
#include "scalars.h"

namespace pruneopd {

/// Where response b lies among the positions, whatever cu_seqlens may say.
struct Extent {
  int64_t begin, end;
};
inline Extent extent_of(const Responses& responses, int64_t b) {
  const int64_t positions = responses.positions;
  if (!responses.cu_seqlens) {
    const int64_t length = positions / responses.count;
    return {b * length, (b + 1) * length};
  }
  const auto start = [&](int64_t i) { return std::clamp<int64_t>(id_at(responses.cu_seqlens, i), 0, positions); };
  return {start(b), start(b + 1)};
}

/// Positions that are scanned at a time: first the count, one by one, then the rest in loops without a chain.
constexpr int64_t kScanBlock = 256;

/// R and L of a block of positions whose C are known; returns how many count towards E.
inline int32_t scan_block(const bool* valid, const int32_t* counts, int64_t count, const ScanRule& rule,
                          float* __restrict reliabilities, float* __restrict weights) {
  const double w_drop = rule.w_drop, w_base = rule.w_base, eps = rule.eps;
  int32_t effective = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double reliability = reliability_of(counts[i], w_drop);
    const float stored_reliability = static_cast<float>(reliability);
    const float stored_weight = static_cast<float>(weight_of(reliability, w_base));
    reliabilities[i] = valid[i] ? stored_reliability : 0;
    weights[i] = valid[i] ? stored_weight : 0;
    effective += valid[i] & is_effective(reliability, eps);
  }
  return effective;
}

/// Walks every response. stored(n, count) is called when the weights of some positions are there.
template <class Stored>
void scan_responses(const Responses& responses, const View& mask, const View& drift, const ScanRule& rule,
                    const ScanOutputs& out, const ParallelFor& parallel_for, Stored stored) {
  parallel_for(responses.count, 1, [&](int64_t first, int64_t last) {
    const FloatMode mode(/*flush_results=*/false);
    for (int64_t b = first; b < last; ++b) {
      const Extent extent = extent_of(responses, b);
      int64_t drift_count = rule.drift_count ? id_at(rule.drift_count, b) : 0;
      int32_t effective_length = 0;
      for (int64_t n = extent.begin; n < extent.end; n += kScanBlock) {
        const int64_t count = std::min(kScanBlock, extent.end - n);
        bool valid[kScanBlock], drifts[kScanBlock];
        load_flags(mask, n, count, valid);
        load_flags(drift, n, count, drifts);
        int32_t counts[kScanBlock];
        for (int64_t i = 0; i < count; ++i) counts[i] = stored_count(drift_count += valid[i] & drifts[i]);
        effective_length += scan_block(valid, counts, count, rule, out.reliability + n, out.weight + n);
        std::copy_n(counts, count, out.drift_count + n);
        stored(n, count);
      }
      out.effective_length[b] = effective_length;
    }
  });
}

}  // namespace pruneopd
