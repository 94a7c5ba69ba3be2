#include "operators/reliability_from_drift.h"

#include "responses.h"

namespace pruneopd {

template <>
void compute(const ReliabilityFromDriftArgs& args, const ParallelFor& parallel_for) {
  scan_responses(
      args.responses, args.mask, args.scan_rule, args.scan, parallel_for,
      [&](int64_t n, int64_t count, bool* drift) { load_flags(args.drift, n, count, drift); }, [](int64_t, int64_t) {});
}

}  // namespace pruneopd
