// topk_forward_kl: the forward KL over the teacher's top-k, with the masses and the overlap.
#pragma once

#include <limits>

#include "math/loss.h"
#include "operators/call.h"

namespace pruneopd {

struct TopkForwardKlArgs {
  static constexpr const char* kName = "topk_forward_kl";

  Logits student;
  View teacher_topk_ids, teacher_topk_logprobs;  // [..., k]
  View mask;
  int64_t positions, k;
  double logprob_min;  // -inf: none

  struct Outputs {
    float *loss, *student_mass, *teacher_mass, *overlap, *overlap_token_advantage;
    int64_t* student_topk_ids;  // [..., k]
    float* coefficients;        // [..., k]
    float* state;               // [..., kRowState]
  } out;

  static TopkForwardKlArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), ids = call.tensor("teacher_topk_ids");
    const Array logprobs = call.tensor("teacher_topk_logprobs");
    const MaybeArray mask = call.optional_tensor("mask");
    TopkForwardKlArgs args;
    args.logprob_min = call.optional_number("logprob_min").value_or(-std::numeric_limits<double>::infinity());
    args.student = call.read_student_logits(student);

    const Shape positions = without_last(student.shape);
    args.positions = count(positions);
    args.teacher_topk_ids = call.ids("teacher_topk_ids", ids, positions, kMaxCandidates, "k");
    args.k = ids.shape.back();
    call.check_candidates("teacher_topk_ids", args.k, args.student.vocab_size);
    args.teacher_topk_logprobs = call.rows("teacher_topk_logprobs", logprobs, ids.shape, kLogprobs);
    args.mask = call.values("mask", mask, positions, kMask);

    Outputs& out = args.out;
    for (float** output : {&out.loss, &out.student_mass, &out.teacher_mass, &out.overlap, &out.overlap_token_advantage})
      *output = call.output<float>(positions);
    out.student_topk_ids = call.output<int64_t>(ids.shape);
    out.coefficients = call.output<float>(ids.shape);
    out.state = call.output<float>(with_last(positions, kRowState));
    return args;
  }
};

}  // namespace pruneopd
