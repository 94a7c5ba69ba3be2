// row_stats: log-probabilities of given ids, entropy, log-sum-exp and candidates of one model's rows.
#pragma once

#include "math/state.h"
#include "operators/call.h"

namespace pruneopd {

struct RowStatsArgs {
  static constexpr const char* kName = "row_stats";

  Logits logits;
  View token_ids;  // [..., m]
  View mask;
  int64_t positions, m, k;
  bool entropy;  // else it is not summed, and 0

  struct Outputs {
    double* logprobs;  // [..., m]
    float *entropy, *lse;
    int64_t* topk_ids;  // [..., k]
    int32_t* filled;    // how many of these have a logit above -inf
    double* state;      // [..., kRowState]
  } out;

  static RowStatsArgs from(Call& call) {
    const Array logits = call.tensor("logits"), token_ids = call.tensor("token_ids");
    const MaybeArray mask = call.optional_tensor("mask");
    RowStatsArgs args;
    args.k = call.integer("k");
    args.entropy = call.boolean("entropy");
    args.logits = call.read_logits(logits);

    const Shape positions = without_last(logits.shape);
    args.positions = count(positions);
    args.token_ids = call.ids("token_ids", token_ids, positions, kMaxTokenIds, "m");
    args.m = token_ids.shape.back();
    args.mask = call.values("mask", mask, positions, kMask);
    call.check_k(args.k, args.logits.vocab_size, /*least=*/0);

    args.out.logprobs = call.output<double>(token_ids.shape);
    args.out.entropy = call.output<float>(positions);
    args.out.lse = call.output<float>(positions);
    args.out.topk_ids = call.output<int64_t>(with_last(positions, args.k));
    args.out.filled = call.output<int32_t>(positions);
    args.out.state = call.output<double>(with_last(positions, kRowState));
    return args;
  }
};

}  // namespace pruneopd
