// The scan along the responses, shared by the three operators that have one.
#pragma once

#include "../math/scan.h"
#include "operators.h"
#include "scalars.h"

namespace pruneopd {

/// Walks every response: drifts(n) tells whether a valid position drifts, stored(n, L) sees each weight.
template <class Drifts, class Stored>
void scan_responses(const Responses& responses, const View& mask, const ScanRule& rule, const ScanOutputs& out,
                    const ParallelFor& parallel_for, Drifts drifts, Stored stored) {
  parallel_for(responses.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      ScanState state;
      if (rule.drift_count) state.drift_count = rule.drift_count[b];
      for (int64_t n = responses.begin(b); n < responses.end(b); ++n) {
        const bool valid = load_flag(mask, n);
        state.step(valid, valid && drifts(n), rule.w_drop, rule.w_base, rule.eps);
        out.drift_count[n] = state.stored_count();
        out.reliability[n] = static_cast<float>(state.reliability);
        out.weight[n] = state.weight;
        stored(n, state.weight);
      }
      out.effective_length[b] = state.effective_length;
    }
  });
}

}  // namespace pruneopd
