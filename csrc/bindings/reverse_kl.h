// reverse_kl and its backward pass over the tensors of either world: the arguments are those of
// pruneopd_kernels/schemas.py, in its order.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor>
auto reverse_kl(const World& world, const Tensor& student_logits, const Tensor& teacher_logits,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& weight, double student_temperature,
                double teacher_temperature, std::optional<int64_t> vocab_size) {
  const Guard guard("reverse_kl", world.device());
  const Array student = World::describe(student_logits);

  ReverseKlArgs args;
  args.logits = guard.logits(student, World::describe(teacher_logits), student_temperature, teacher_temperature,
                             vocab_size, /*along_responses=*/false);
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  args.mask = guard.values("mask", describe<World>(mask), positions, kMask);
  args.weight = guard.values("weight", describe<World>(weight), positions, kLogprobs);

  Output<World, float> loss(world, positions), state(world, with_last(positions, kDivergenceState));
  args.loss = loss;
  args.state = state;
  world.compute(args);
  return std::tuple(loss.tensor, state.tensor);
}

template <class World, class Tensor = typename World::Tensor>
Tensor reverse_kl_backward(const World& world, const Tensor& student_logits, const Tensor& teacher_logits,
                           const Tensor& state, const Tensor& scale, double student_temperature,
                           double teacher_temperature, std::optional<int64_t> vocab_size) {
  const Guard guard("reverse_kl_backward", world.device());
  const Array student = World::describe(student_logits);

  ReverseKlBackwardArgs args;
  args.logits = guard.logits(student, World::describe(teacher_logits), student_temperature, teacher_temperature,
                             vocab_size, /*along_responses=*/false);
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  args.state = guard.rows("state", World::describe(state), with_last(positions, kDivergenceState), kFloat);
  args.scale = guard.values("scale", World::describe(scale), positions, kFloat);

  Tensor gradient = World::empty_like(student_logits);
  args.gradient = World::template data<void>(gradient);
  args.width = student.shape.back();
  world.compute(args);
  return gradient;
}

}  // namespace pruneopd::bindings
