// logprobs_backward: the gradient of sum(coefficients * log p[token_ids]) + entropy_coefficient * entropy by the
// logits. Ids that do not exist count in the sum of coefficients and have no logit.
#pragma once

#include "math/state.h"
#include "operators/call.h"

namespace pruneopd {

struct LogprobsBackwardArgs {
  static constexpr const char* kName = "logprobs_backward";

  Logits logits;
  View token_ids, coefficients;  // [..., m]
  View state;                    // [..., kRowState]
  View entropy_coefficient;      // not given: 0
  int64_t positions, m;

  void* gradient;  // [..., width], of the logits' type
  int64_t width;

  static LogprobsBackwardArgs from(Call& call) {
    const Array logits = call.tensor("logits"), token_ids = call.tensor("token_ids");
    const Array coefficients = call.tensor("coefficients"), state = call.tensor("state");
    const MaybeArray entropy_coefficient = call.optional_tensor("entropy_coefficient");
    LogprobsBackwardArgs args;
    args.logits = call.read_logits(logits);

    const Shape positions = without_last(logits.shape);
    args.positions = count(positions);
    args.token_ids = call.ids("token_ids", token_ids, positions, kMaxTokenIds, "m");
    args.m = token_ids.shape.back();
    args.coefficients = call.rows("coefficients", coefficients, token_ids.shape, kGradient);
    args.state = call.rows("state", state, with_last(positions, kRowState), kState);
    args.entropy_coefficient = call.values("entropy_coefficient", entropy_coefficient, positions, kGradient);
    args.gradient = call.output_like_first(logits);
    args.width = logits.shape.back();
    return args;
  }
};

}  // namespace pruneopd
