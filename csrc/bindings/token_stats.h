// token_stats over the tensors of either world: the arguments are those of pruneopd_kernels/schemas.py, in its order.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor>
auto token_stats(const World& world, const Tensor& student_logits, const Tensor& teacher_logits,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& token_ids, int64_t k,
                 double student_temperature, double teacher_temperature, std::optional<int64_t> vocab_size) {
  const Guard guard("token_stats", world.device());
  const Array student = World::describe(student_logits);

  TokenStatsArgs args;
  args.logits = guard.logits(student, World::describe(teacher_logits), student_temperature, teacher_temperature,
                             vocab_size, /*along_responses=*/false);
  guard.candidates(k, args.logits.vocab_size);
  args.k = k;
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  args.mask = guard.values("mask", describe<World>(mask), positions, kMask);
  args.token_ids = guard.values("token_ids", describe<World>(token_ids), positions, kIds);

  const Shape candidates = with_last(positions, k);
  Output<World, int64_t> student_topk_ids(world, candidates), teacher_topk_ids(world, candidates);
  Output<World, float> student_topk_logprobs(world, candidates), teacher_topk_logprobs(world, candidates);
  Output<World, float> teacher_on_student_logprobs(world, candidates), student_on_teacher_logprobs(world, candidates);
  Output<World, float> overlap(world, positions), student_lse(world, positions), teacher_lse(world, positions);
  Output<World, float> student_entropy(world, positions), teacher_entropy(world, positions);
  Output<World, float> reverse_kl(world, positions), forward_kl(world, positions);
  Output<World, float> student_token_logprob(world, positions), teacher_token_logprob(world, positions);
  args.student_topk_ids = student_topk_ids;
  args.teacher_topk_ids = teacher_topk_ids;
  args.student_topk_logprobs = student_topk_logprobs;
  args.teacher_topk_logprobs = teacher_topk_logprobs;
  args.teacher_on_student_logprobs = teacher_on_student_logprobs;
  args.student_on_teacher_logprobs = student_on_teacher_logprobs;
  args.overlap = overlap;
  args.student_lse = student_lse;
  args.teacher_lse = teacher_lse;
  args.student_entropy = student_entropy;
  args.teacher_entropy = teacher_entropy;
  args.reverse_kl = reverse_kl;
  args.forward_kl = forward_kl;
  args.student_token_logprob = student_token_logprob;
  args.teacher_token_logprob = teacher_token_logprob;
  world.compute(args);
  return std::tuple(student_topk_ids.tensor, student_topk_logprobs.tensor, teacher_topk_ids.tensor,
                    teacher_topk_logprobs.tensor, teacher_on_student_logprobs.tensor,
                    student_on_teacher_logprobs.tensor, overlap.tensor, student_lse.tensor, teacher_lse.tensor,
                    student_entropy.tensor, teacher_entropy.tensor, reverse_kl.tensor, forward_kl.tensor,
                    student_token_logprob.tensor, teacher_token_logprob.tensor);
}

}  // namespace pruneopd::bindings
