// reliability_from_drift: a block takes a response.
#include "operators/reliability_from_drift.h"
#include "scan.cuh"

namespace pruneopd::cuda {
namespace {

__global__ void __launch_bounds__(kScanThreads, 2) scan_kernel(Scan scan) { scan_response(scan, blockIdx.x); }

}  // namespace

void scan_responses(const Scan& scan, const Queue& queue) {
  if (scan.responses.count == 0) return;
  launch(&scan_kernel, scan.responses.count, kScanThreads, sizeof(ScanMemory), queue, scan);
}

template <>
void compute(const ReliabilityFromDriftArgs& args, const Queue& queue) {
  scan_responses(Scan(args.mask, args.drift, args.responses, args.scan_rule, args.scan), queue);
}

}  // namespace pruneopd::cuda
