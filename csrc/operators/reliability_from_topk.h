// reliability_from_topk: the same from both models' top-k ids, without rewards.
#pragma once

#include "operators/call.h"

namespace pruneopd {

struct ReliabilityFromTopkArgs {
  static constexpr const char* kName = "reliability_from_topk";

  View student_topk_ids, teacher_topk_ids;  // [..., k]
  View mask, student_topk_logprobs, teacher_topk_logprobs, token_ids;
  Responses responses;
  int64_t k = 0;
  DriftRule drift_rule;
  ScanRule scan_rule;

  struct Outputs {
    float* overlap;
    bool* drift;
    ScanOutputs scan;
  } out;

  static ReliabilityFromTopkArgs from(Call& call) {
    const Array student = call.tensor("student_topk_ids"), teacher = call.tensor("teacher_topk_ids");
    const MaybeArray mask = call.optional_tensor("mask");
    const MaybeArray student_logprobs = call.optional_tensor("student_topk_logprobs");
    const MaybeArray teacher_logprobs = call.optional_tensor("teacher_topk_logprobs");
    const MaybeArray token_ids = call.optional_tensor("token_ids");
    const MaybeArray cu_seqlens = call.optional_tensor("cu_seqlens"), drift_count = call.optional_tensor("drift_count");
    ReliabilityFromTopkArgs args;
    const double threshold = call.number("threshold");
    args.scan_rule = call.read_scan_rule();
    const std::string metric = call.text("metric");
    args.drift_rule = {Metric::kOverlap, threshold, call.number("top_p")};

    args.student_topk_ids = call.topk_ids("student_topk_ids", student);
    args.teacher_topk_ids = call.rows("teacher_topk_ids", teacher, student.shape, kIds);
    args.k = student.shape.back();
    const Shape positions = without_last(student.shape);
    args.mask = call.values("mask", mask, positions, kMask);
    args.student_topk_logprobs = call.rows("student_topk_logprobs", student_logprobs, student.shape, kLogprobs);
    args.teacher_topk_logprobs = call.rows("teacher_topk_logprobs", teacher_logprobs, student.shape, kLogprobs);
    args.token_ids = call.values("token_ids", token_ids, positions, kIds);
    args.responses =
        call.responses(positions, cu_seqlens, "student_topk_ids are [N, k]", "student_topk_ids are [B, T, k]");
    args.scan_rule.drift_count = call.values("drift_count", drift_count, {args.responses.count}, kInt32);
    args.drift_rule.metric = call.metric(metric);
    call.check_given_for_top_p(args.drift_rule, "teacher_topk_logprobs", teacher_logprobs);
    call.check_given_for_top_p(args.drift_rule, "token_ids", token_ids);

    args.out.overlap = call.output<float>(positions);
    args.out.drift = call.output<bool>(positions);
    args.out.scan = call.scan_outputs(positions, args.responses.count);
    return args;
  }
};

}  // namespace pruneopd
