// topk_forward_kl over the tensors of either world: the arguments are those of pruneopd_kernels/schemas.py, in its
// order.
#pragma once

#include <limits>
#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor>
auto topk_forward_kl(const World& world, const Tensor& student_logits, const Tensor& teacher_topk_ids,
                     const Tensor& teacher_topk_logprobs, const std::optional<Tensor>& mask,
                     std::optional<double> logprob_min, double student_temperature, std::optional<int64_t> vocab_size) {
  const Guard guard("topk_forward_kl", world.device());
  const Array student = World::describe(student_logits), ids = World::describe(teacher_topk_ids);

  TopkForwardKlArgs args;
  args.student = guard.student_logits(student, student_temperature, vocab_size);
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  args.teacher_topk_ids = guard.ids("teacher_topk_ids", ids, positions, kMaxCandidates, "k");
  args.k = ids.shape.back();
  guard.candidates("teacher_topk_ids", args.k, args.student.vocab_size);
  args.teacher_topk_logprobs =
      guard.rows("teacher_topk_logprobs", World::describe(teacher_topk_logprobs), ids.shape, kLogprobs);
  args.mask = guard.values("mask", describe<World>(mask), positions, kMask);
  args.logprob_min = logprob_min.value_or(-std::numeric_limits<double>::infinity());

  Output<World, float> loss(world, positions), student_mass(world, positions), teacher_mass(world, positions);
  Output<World, float> overlap(world, positions), overlap_token_advantage(world, positions);
  Output<World, int64_t> student_topk_ids(world, ids.shape);
  Output<World, float> coefficients(world, ids.shape), state(world, with_last(positions, kRowState));
  args.loss = loss;
  args.student_mass = student_mass;
  args.teacher_mass = teacher_mass;
  args.overlap = overlap;
  args.overlap_token_advantage = overlap_token_advantage;
  args.student_topk_ids = student_topk_ids;
  args.coefficients = coefficients;
  args.state = state;
  world.compute(args);
  return std::tuple(loss.tensor, student_mass.tensor, teacher_mass.tensor, overlap.tensor,
                    overlap_token_advantage.tensor, student_topk_ids.tensor, coefficients.tensor, state.tensor);
}

}  // namespace pruneopd::bindings
