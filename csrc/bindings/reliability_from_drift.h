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
  const Guard guard("reliability_from_drift", world.device());
  const Array flags = World::describe(drift);

  ReliabilityFromDriftArgs args;
  args.drift = guard.drift(flags);
  args.mask = guard.values("mask", describe<World>(mask), flags.shape, kMask);
  args.responses = guard.responses(flags.shape, describe<World>(cu_seqlens), "drift is [N]", "drift is [B, T]");
  args.scan_rule = guard.scan_rule(w_drop, w_base, eps, describe<World>(drift_count), args.responses.count);

  Output<World, int32_t> scanned_count(world, flags.shape), effective_length(world, {args.responses.count});
  Output<World, float> reliability(world, flags.shape), weight(world, flags.shape);
  args.scan = {scanned_count, reliability, weight, effective_length};
  world.compute(args);
  return std::tuple(scanned_count.tensor, reliability.tensor, weight.tensor, effective_length.tensor);
}

}  // namespace pruneopd::bindings
