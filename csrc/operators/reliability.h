// reliability: from both models' logits to overlap, drift, the weights along each response, and the rewards.
// opd_scores: the same, and what the losses of a training step take.
#pragma once

#include <tuple>

#include "math/state.h"
#include "operators/call.h"

namespace pruneopd {

struct ReliabilityArgs {
  static constexpr const char* kName = "reliability";

  Logits student, teacher;
  View mask, token_ids;  // token_ids are read if the metric is kTopP, and by opd_scores
  View weight;           // what multiplies the rewards in place of L
  Responses responses;
  int64_t k = 0;
  DriftRule drift_rule;
  ScanRule scan_rule;
  RewardWeight reward_weight = RewardWeight::kStudent;
  bool entropies = false, divergence = false;  // what is summed beside the masses; reverse_kl with either of them

  struct Outputs {
    float* overlap;
    bool* drift;
    ScanOutputs scan;
    int64_t* topk_ids;  // [..., k]
    float* rewards;     // [..., k]
    // Of opd_scores; null: not wanted.
    bool* accepted = nullptr;
    float *student_entropy = nullptr, *teacher_entropy = nullptr;
    double* reverse_kl = nullptr;
    double* state = nullptr;  // [..., kDivergenceState], of which without divergence only the student's two are set
  } out;

  static ReliabilityArgs from(Call& call) { return read(call, /*is_opd_scores=*/false); }

 protected:
  static ReliabilityArgs read(Call& call, bool is_opd_scores) {
    const Array student = call.tensor("student_logits"), teacher = call.tensor("teacher_logits");
    const MaybeArray mask = call.optional_tensor("mask"), token_ids = call.optional_tensor("token_ids");
    const MaybeArray weight = is_opd_scores ? call.optional_tensor("weight") : std::nullopt;
    const MaybeArray cu_seqlens = call.optional_tensor("cu_seqlens"), drift_count = call.optional_tensor("drift_count");
    ReliabilityArgs args;
    args.k = call.integer("k");
    const double threshold = call.number("threshold");
    args.scan_rule = call.read_scan_rule();
    const std::string metric = call.text("metric");
    args.drift_rule = {Metric::kOverlap, threshold, call.number("top_p")};
    const std::string reward_weight = call.text("reward_weight");
    std::tie(args.student, args.teacher) = call.read_logits_pair(student, teacher, /*along_responses=*/true);
    args.entropies = is_opd_scores && call.boolean("entropies");
    args.divergence = is_opd_scores && call.boolean("divergence");

    const Shape positions = without_last(student.shape);
    call.check_k(args.k, args.student.vocab_size);
    args.mask = call.values("mask", mask, positions, kMask);
    args.token_ids = call.values("token_ids", token_ids, positions, kIds);
    args.weight = call.values("weight", weight, positions, kLogprobs);
    args.responses = call.responses(positions, cu_seqlens, "student_logits are [N, V]", "student_logits are [B, T, V]");
    args.scan_rule.drift_count = call.values("drift_count", drift_count, {args.responses.count}, kInt32);
    args.drift_rule.metric = call.metric(metric);
    call.check_given_for_top_p(args.drift_rule, "token_ids", token_ids);
    args.reward_weight = call.reward_weight(reward_weight);

    Outputs& out = args.out;
    out.overlap = call.output<float>(positions);
    out.drift = call.output<bool>(positions);
    out.scan = call.scan_outputs(positions, args.responses.count);
    out.topk_ids = call.output<int64_t>(with_last(positions, args.k));
    out.rewards = call.output<float>(with_last(positions, args.k));
    if (!is_opd_scores) return args;
    out.accepted = call.output<bool>(positions);
    out.student_entropy = call.output<float>(positions);
    out.teacher_entropy = call.output<float>(positions);
    out.reverse_kl = call.output<double>(positions);
    out.state = call.output<double>(with_last(positions, kDivergenceState));
    return args;
  }
};

struct OpdScoresArgs : ReliabilityArgs {
  static constexpr const char* kName = "opd_scores";

  static OpdScoresArgs from(Call& call) { return {read(call, /*is_opd_scores=*/true)}; }
};

}  // namespace pruneopd
