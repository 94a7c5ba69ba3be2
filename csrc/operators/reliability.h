// reliability: from both models' logits to overlap, drift, the weights along each response, and the rewards.
#pragma once

#include <tuple>

#include "operators/call.h"

namespace pruneopd {

struct ReliabilityArgs {
  static constexpr const char* kName = "reliability";

  Logits student, teacher;
  View mask, token_ids;  // token_ids is read if the metric is kTopP
  Responses responses;
  int64_t k = 0;
  DriftRule drift_rule;
  ScanRule scan_rule;
  RewardWeight reward_weight = RewardWeight::kStudent;

  struct Outputs {
    float* overlap;
    bool* drift;
    ScanOutputs scan;
    int64_t* topk_ids;  // [..., k]
    float* rewards;     // [..., k]
  } out;

  static ReliabilityArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), teacher = call.tensor("teacher_logits");
    const MaybeArray mask = call.optional_tensor("mask"), token_ids = call.optional_tensor("token_ids");
    const MaybeArray cu_seqlens = call.optional_tensor("cu_seqlens"), drift_count = call.optional_tensor("drift_count");
    ReliabilityArgs args;
    args.k = call.integer("k");
    const double threshold = call.number("threshold");
    args.scan_rule = call.read_scan_rule();
    const std::string metric = call.text("metric");
    args.drift_rule = {Metric::kOverlap, threshold, call.number("top_p")};
    const std::string reward_weight = call.text("reward_weight");
    std::tie(args.student, args.teacher) = call.read_logits_pair(student, teacher, /*along_responses=*/true);

    const Shape positions = without_last(student.shape);
    call.check_k(args.k, args.student.vocab_size);
    args.mask = call.values("mask", mask, positions, kMask);
    args.token_ids = call.values("token_ids", token_ids, positions, kIds);
    args.responses = call.responses(positions, cu_seqlens, "student_logits are [N, V]", "student_logits are [B, T, V]");
    args.scan_rule.drift_count = call.values("drift_count", drift_count, {args.responses.count}, kInt32);
    args.drift_rule.metric = call.metric(metric);
    call.check_given_for_top_p(args.drift_rule, "token_ids", token_ids);
    args.reward_weight = call.reward_weight(reward_weight);

    args.out.overlap = call.output<float>(positions);
    args.out.drift = call.output<bool>(positions);
    args.out.scan = call.scan_outputs(positions, args.responses.count);
    args.out.topk_ids = call.output<int64_t>(with_last(positions, args.k));
    args.out.rewards = call.output<float>(with_last(positions, args.k));
    return args;
  }
};

}  // namespace pruneopd
