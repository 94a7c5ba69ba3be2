// topk_policy_loss and the backward pass of losses over candidates, over the tensors of either world: the arguments are
// those of pruneopd_kernels/schemas.py, in its order.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor>
auto topk_policy_loss(const World& world, const Tensor& student_logits, const Tensor& topk_ids,
                      const Tensor& advantages, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& old_logprobs, double clip_low, double clip_high, double clip_dual,
                      double student_temperature, std::optional<int64_t> vocab_size) {
  const Guard guard("topk_policy_loss", world.device());
  const Array student = World::describe(student_logits), ids = World::describe(topk_ids);

  TopkPolicyLossArgs args;
  args.student = guard.student_logits(student, student_temperature, vocab_size);
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  args.topk_ids = guard.ids("topk_ids", ids, positions, kMaxPolicyCandidates, "m");
  args.m = ids.shape.back();
  args.advantages = guard.rows("advantages", World::describe(advantages), ids.shape, kLogprobs);
  args.mask = guard.values("mask", describe<World>(mask), positions, kMask);
  args.old_logprobs = guard.rows("old_logprobs", describe<World>(old_logprobs), ids.shape, kLogprobs);
  args.clip_low = clip_low;
  args.clip_high = clip_high;
  args.clip_dual = clip_dual;

  Output<World, float> loss(world, positions), coefficients(world, ids.shape);
  Output<World, float> state(world, with_last(positions, kRowState));
  args.loss = loss;
  args.coefficients = coefficients;
  args.state = state;
  world.compute(args);
  return std::tuple(loss.tensor, coefficients.tensor, state.tensor);
}

template <class World, class Tensor = typename World::Tensor>
Tensor logprobs_backward(const World& world, const Tensor& student_logits, const Tensor& topk_ids,
                         const Tensor& coefficients, const Tensor& state, const Tensor& scale,
                         double student_temperature, std::optional<int64_t> vocab_size) {
  const Guard guard("logprobs_backward", world.device());
  const Array student = World::describe(student_logits), ids = World::describe(topk_ids);

  LogprobsBackwardArgs args;
  args.student = guard.student_logits(student, student_temperature, vocab_size);
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  args.topk_ids = guard.ids("topk_ids", ids, positions, kMaxPolicyCandidates, "m");
  args.m = ids.shape.back();
  args.coefficients = guard.rows("coefficients", World::describe(coefficients), ids.shape, kFloat);
  args.state = guard.rows("state", World::describe(state), with_last(positions, kRowState), kFloat);
  args.scale = guard.values("scale", World::describe(scale), positions, kFloat);

  Tensor gradient = World::empty_like(student_logits);
  args.gradient = World::template data<void>(gradient);
  args.width = student.shape.back();
  world.compute(args);
  return gradient;
}

}  // namespace pruneopd::bindings
