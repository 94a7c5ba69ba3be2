// token_stats: what both models say about each position.
#pragma once

#include <tuple>

#include "operators/call.h"

namespace pruneopd {

struct TokenStatsArgs {
  static constexpr const char* kName = "token_stats";

  Logits student, teacher;
  View mask, token_ids;
  int64_t positions = 0, k = 0;

  /// 0 is the student's, 1 the teacher's.
  struct Outputs {
    int64_t* topk_ids[2];        // [..., k]
    float* topk_logprobs[2];     // [..., k]
    float* partner_logprobs[2];  // [..., k]: of these ids in the other model
    float* overlap;
    float *lse[2], *entropy[2];
    float* divergence[2];  // reverse KL, forward KL
    float* token_logprob[2];
  } out;

  static TokenStatsArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), teacher = call.tensor("teacher_logits");
    const MaybeArray mask = call.optional_tensor("mask"), token_ids = call.optional_tensor("token_ids");
    TokenStatsArgs args;
    args.k = call.integer("k");
    std::tie(args.student, args.teacher) = call.read_logits_pair(student, teacher);

    call.check_k(args.k, args.student.vocab_size);
    const Shape positions = without_last(student.shape), candidates = with_last(positions, args.k);
    args.positions = count(positions);
    args.mask = call.values("mask", mask, positions, kMask);
    args.token_ids = call.values("token_ids", token_ids, positions, kIds);

    for (const int side : {0, 1}) {
      args.out.topk_ids[side] = call.output<int64_t>(candidates);
      args.out.topk_logprobs[side] = call.output<float>(candidates);
    }
    for (float*& output : args.out.partner_logprobs) output = call.output<float>(candidates);
    args.out.overlap = call.output<float>(positions);
    for (auto* outputs : {&args.out.lse, &args.out.entropy, &args.out.divergence, &args.out.token_logprob})
      for (float*& output : *outputs) output = call.output<float>(positions);
    return args;
  }
};

}  // namespace pruneopd
