// reliability_from_drift: the weights along each response, from the positions that drift.
#pragma once

#include "operators/call.h"

namespace pruneopd {

struct ReliabilityFromDriftArgs {
  static constexpr const char* kName = "reliability_from_drift";

  View drift, mask;
  Responses responses;
  ScanRule scan_rule;

  ScanOutputs scan;

  static ReliabilityFromDriftArgs from(Call& call) {
    const Array drift = call.tensor("drift");
    const MaybeArray mask = call.optional_tensor("mask");
    const MaybeArray cu_seqlens = call.optional_tensor("cu_seqlens"), drift_count = call.optional_tensor("drift_count");
    ReliabilityFromDriftArgs args;
    args.scan_rule = call.read_scan_rule();

    args.drift = call.drift(drift);
    args.mask = call.values("mask", mask, drift.shape, kMask);
    args.responses = call.responses(drift.shape, cu_seqlens, "drift is [N]", "drift is [B, T]");
    args.scan_rule.drift_count = call.values("drift_count", drift_count, {args.responses.count}, kInt32);
    args.scan = call.scan_outputs(drift.shape, args.responses.count);
    return args;
  }
};

}  // namespace pruneopd
