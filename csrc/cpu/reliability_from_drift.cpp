#include "operators/reliability_from_drift.h"

#include "responses.h"

namespace pruneopd {

template <>
void compute(const ReliabilityFromDriftArgs& args, const ParallelFor& parallel_for) {
  scan_responses(args.responses, args.mask, args.drift, args.scan_rule, args.scan, parallel_for,
                 [](int64_t, int64_t) {});
}

}  // namespace pruneopd
