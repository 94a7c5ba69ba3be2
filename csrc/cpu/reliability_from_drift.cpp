#include "responses.h"

namespace pruneopd {

void reliability_from_drift(const ReliabilityFromDriftArgs& args, const ParallelFor& parallel_for) {
  scan_responses(
      args.responses, args.mask, args.scan_rule, args.scan, parallel_for,
      [&](int64_t n) { return load_flag(args.drift, n); }, [](int64_t, float) {});
}

}  // namespace pruneopd
