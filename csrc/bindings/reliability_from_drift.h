// reliability_from_drift over the tensors of either world: the arguments are those of pruneopd_kernels/schemas.py.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor>
auto reliability_from_drift(const World& world, const Tensor& drift, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& drift_count,
                            double w_drop, double w_base, double eps) {
  const Guard guard("reliability_from_drift");
  const Array flags = World::describe(drift);

  ReliabilityFromDriftArgs args;
  args.drift = guard.drift(flags);
  args.mask = guard.values("mask", describe<World>(mask), flags.shape, kMask);
  const auto starts = guard.int32s("cu_seqlens", describe<World>(cu_seqlens), "[B + 1]");
  args.responses = guard.responses(flags.shape, starts, "drift is [N]", "drift is [B, T]");
  const auto counts = guard.int32s("drift_count", describe<World>(drift_count), "[B]");
  args.scan_rule = guard.scan_rule(w_drop, w_base, eps, counts, args.responses.count);

  Output<World, int32_t> scanned_count(flags.shape), effective_length({args.responses.count});
  Output<World, float> reliability(flags.shape), weight(flags.shape);
  args.scan = {scanned_count, reliability, weight, effective_length};
  world.run([&](const ParallelFor& parallel_for) { pruneopd::reliability_from_drift(args, parallel_for); });
  return std::tuple(scanned_count.tensor, reliability.tensor, weight.tensor, effective_length.tensor);
}

}  // namespace pruneopd::bindings
