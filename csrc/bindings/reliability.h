// reliability over the tensors of either world: the arguments are those of pruneopd_kernels/schemas.py, in its order.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor, class Text = typename World::Text>
auto reliability(const World& world, const Tensor& student_logits, const Tensor& teacher_logits,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& token_ids,
                 const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& drift_count, int64_t k,
                 double threshold, double w_drop, double w_base, double eps, const Text& metric, double top_p,
                 const Text& reward_weight, double student_temperature, double teacher_temperature,
                 std::optional<int64_t> vocab_size) {
  const Guard guard("reliability", world.device());
  const Array student = World::describe(student_logits);
  const MaybeArray ids = describe<World>(token_ids);

  ReliabilityArgs args;
  args.logits = guard.logits(student, World::describe(teacher_logits), student_temperature, teacher_temperature,
                             vocab_size, /*along_responses=*/true);
  guard.candidates(k, args.logits.vocab_size);
  args.k = k;
  const Shape positions = without_last(student.shape);
  args.mask = guard.values("mask", describe<World>(mask), positions, kMask);
  args.token_ids = guard.values("token_ids", ids, positions, kIds);
  args.responses = guard.responses(positions, describe<World>(cu_seqlens), "student_logits are [N, V]",
                                   "student_logits are [B, T, V]");
  args.scan_rule = guard.scan_rule(w_drop, w_base, eps, describe<World>(drift_count), args.responses.count);
  args.drift_rule = guard.drift_rule(metric, threshold, top_p);
  guard.needed_for_top_p(args.drift_rule, "token_ids", ids);
  args.reward_weight = guard.reward_weight(reward_weight);

  Output<World, float> overlap(world, positions), scanned_reliability(world, positions), weight(world, positions);
  Output<World, bool> drift(world, positions);
  Output<World, int32_t> scanned_count(world, positions), effective_length(world, {args.responses.count});
  Output<World, int64_t> topk_ids(world, with_last(positions, k));
  Output<World, float> rewards(world, with_last(positions, k));
  args.overlap = overlap;
  args.drift = drift;
  args.scan = {scanned_count, scanned_reliability, weight, effective_length};
  args.topk_ids = topk_ids;
  args.rewards = rewards;
  world.compute(args);
  return std::tuple(overlap.tensor, drift.tensor, scanned_count.tensor, scanned_reliability.tensor, weight.tensor,
                    effective_length.tensor, topk_ids.tensor, rewards.tensor);
}

}  // namespace pruneopd::bindings
