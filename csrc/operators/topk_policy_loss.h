// topk_policy_loss: the clipped policy gradient over given candidates.
#pragma once

#include "math/loss.h"
#include "operators/call.h"

namespace pruneopd {

struct TopkPolicyLossArgs {
  static constexpr const char* kName = "topk_policy_loss";

  Logits student;
  View topk_ids, advantages, old_logprobs;  // [..., m]
  View mask;
  int64_t positions, m;
  PolicyClips clips;

  struct Outputs {
    float* loss;
    float* coefficients;  // [..., m]: derivatives of the loss by the candidates' log-probabilities
    float* state;         // [..., kRowState]
  } out;

  static TopkPolicyLossArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), ids = call.tensor("topk_ids");
    const Array advantages = call.tensor("advantages");
    const MaybeArray mask = call.optional_tensor("mask"), old_logprobs = call.optional_tensor("old_logprobs");
    TopkPolicyLossArgs args;
    args.clips.low = call.number("clip_low");
    args.clips.high = call.number("clip_high");
    args.clips.dual = call.number("clip_dual");
    args.student = call.read_student_logits(student);

    const Shape positions = without_last(student.shape);
    args.positions = count(positions);
    args.topk_ids = call.ids("topk_ids", ids, positions, kMaxPolicyCandidates, "m");
    args.m = ids.shape.back();
    args.advantages = call.rows("advantages", advantages, ids.shape, kLogprobs);
    args.mask = call.values("mask", mask, positions, kMask);
    args.old_logprobs = call.rows("old_logprobs", old_logprobs, ids.shape, kLogprobs);

    args.out.loss = call.output<float>(positions);
    args.out.coefficients = call.output<float>(ids.shape);
    args.out.state = call.output<float>(with_last(positions, kRowState));
    return args;
  }
};

}  // namespace pruneopd
