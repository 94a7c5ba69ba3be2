// reverse_kl: KL(student‖teacher) over the whole vocabulary, and its backward pass.
#pragma once

#include <tuple>

#include "math/state.h"
#include "operators/call.h"

namespace pruneopd {

struct ReverseKlArgs {
  static constexpr const char* kName = "reverse_kl";

  Logits student, teacher;
  View mask, weight;
  int64_t positions;

  struct Outputs {
    float* loss;
    double* state;  // [..., kDivergenceState]
  } out;

  static ReverseKlArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), teacher = call.tensor("teacher_logits");
    const MaybeArray mask = call.optional_tensor("mask"), weight = call.optional_tensor("weight");
    ReverseKlArgs args;
    std::tie(args.student, args.teacher) = call.read_logits_pair(student, teacher);

    const Shape positions = without_last(student.shape);
    args.positions = count(positions);
    args.mask = call.values("mask", mask, positions, kMask);
    args.weight = call.values("weight", weight, positions, kLogprobs);
    args.out.loss = call.output<float>(positions);
    args.out.state = call.output<double>(with_last(positions, kDivergenceState));
    return args;
  }
};

/// The gradient of scale * KL(student‖teacher) by the student's logits.
struct ReverseKlBackwardArgs {
  static constexpr const char* kName = "reverse_kl_backward";

  Logits student, teacher;
  View state;  // [..., kDivergenceState]
  View scale;
  int64_t positions;

  void* gradient;  // [..., width], of the student's type
  int64_t width;

  static ReverseKlBackwardArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), teacher = call.tensor("teacher_logits");
    const Array state = call.tensor("state"), scale = call.tensor("scale");
    ReverseKlBackwardArgs args;
    std::tie(args.student, args.teacher) = call.read_logits_pair(student, teacher);

    const Shape positions = without_last(student.shape);
    args.positions = count(positions);
    args.state = call.rows("state", state, with_last(positions, kDivergenceState), kState);
    args.scale = call.values("scale", scale, positions, kGradient);
    args.gradient = call.output_like_first(student);
    args.width = student.shape.back();
    return args;
  }
};

}  // namespace pruneopd
