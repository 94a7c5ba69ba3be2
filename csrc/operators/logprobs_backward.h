// logprobs_backward: the gradient of scale * sum(coefficients * log p[topk_ids]) by the logits, for the losses over
// candidates. Ids that do not exist count in the sum of coefficients and have no logit.
#pragma once

#include "math/loss.h"
#include "operators/call.h"

namespace pruneopd {

struct LogprobsBackwardArgs {
  static constexpr const char* kName = "logprobs_backward";

  Logits student;
  View topk_ids, coefficients;  // [..., m]
  View state;                   // [..., kRowState]
  View scale;
  int64_t positions, m;

  void* gradient;  // [..., width], of the logits' type
  int64_t width;

  static LogprobsBackwardArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), ids = call.tensor("topk_ids");
    const Array coefficients = call.tensor("coefficients"), state = call.tensor("state"), scale = call.tensor("scale");
    LogprobsBackwardArgs args;
    args.student = call.read_student_logits(student);

    const Shape positions = without_last(student.shape);
    args.positions = count(positions);
    args.topk_ids = call.ids("topk_ids", ids, positions, kMaxPolicyCandidates, "m");
    args.m = ids.shape.back();
    args.coefficients = call.rows("coefficients", coefficients, ids.shape, kFloat);
    args.state = call.rows("state", state, with_last(positions, kRowState), kFloat);
    args.scale = call.values("scale", scale, positions, kFloat);
    args.gradient = call.output_like_first(student);
    args.width = student.shape.back();
    return args;
  }
};

}  // namespace pruneopd
