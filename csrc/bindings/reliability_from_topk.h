// reliability_from_topk over the tensors of either world: the arguments are those of pruneopd_kernels/schemas.py.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor, class Text = typename World::Text>
auto reliability_from_topk(const World& world, const Tensor& student_topk_ids, const Tensor& teacher_topk_ids,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& teacher_topk_logprobs,
                           const std::optional<Tensor>& token_ids, const std::optional<Tensor>& cu_seqlens,
                           const std::optional<Tensor>& drift_count, double threshold, double w_drop, double w_base,
                           double eps, const Text& metric, double top_p) {
  const Guard guard("reliability_from_topk", world.device());
  const Array student = World::describe(student_topk_ids);
  const MaybeArray logprobs = describe<World>(teacher_topk_logprobs);
  const MaybeArray ids = describe<World>(token_ids);

  ReliabilityFromTopkArgs args;
  args.student_topk_ids = guard.topk_ids("student_topk_ids", student);
  args.teacher_topk_ids = guard.rows("teacher_topk_ids", World::describe(teacher_topk_ids), student.shape, kIds);
  args.k = student.shape.back();
  const Shape positions = without_last(student.shape);
  args.mask = guard.values("mask", describe<World>(mask), positions, kMask);
  args.teacher_topk_logprobs = guard.rows("teacher_topk_logprobs", logprobs, student.shape, kLogprobs);
  args.token_ids = guard.values("token_ids", ids, positions, kIds);
  args.responses = guard.responses(positions, describe<World>(cu_seqlens), "student_topk_ids are [N, k]",
                                   "student_topk_ids are [B, T, k]");
  args.scan_rule = guard.scan_rule(w_drop, w_base, eps, describe<World>(drift_count), args.responses.count);
  args.drift_rule = guard.drift_rule(metric, threshold, top_p);
  guard.needed_for_top_p(args.drift_rule, "teacher_topk_logprobs", logprobs);
  guard.needed_for_top_p(args.drift_rule, "token_ids", ids);

  Output<World, float> overlap(world, positions), reliability(world, positions), weight(world, positions);
  Output<World, bool> drift(world, positions);
  Output<World, int32_t> scanned_count(world, positions), effective_length(world, {args.responses.count});
  args.overlap = overlap;
  args.drift = drift;
  args.scan = {scanned_count, reliability, weight, effective_length};
  world.compute(args);
  return std::tuple(overlap.tensor, drift.tensor, scanned_count.tensor, reliability.tensor, weight.tensor,
                    effective_length.tensor);
}

}  // namespace pruneopd::bindings
