// row_max: the maxima of both models' rows. It only reads the logits, which gives the benchmarks the speed of reading.
#pragma once

#include <tuple>

#include "operators/call.h"

namespace pruneopd {

struct RowMaxArgs {
  static constexpr const char* kName = "row_max";

  Logits student, teacher;
  int64_t positions;

  float *student_max, *teacher_max;

  static RowMaxArgs from(Call& call) {
    const Array student = call.tensor("student_logits"), teacher = call.tensor("teacher_logits");
    RowMaxArgs args;
    std::tie(args.student, args.teacher) = call.logits_pair(student, teacher, 1, 1, std::nullopt);
    const Shape positions = without_last(student.shape);
    args.positions = count(positions);
    args.student_max = call.output<float>(positions);
    args.teacher_max = call.output<float>(positions);
    return args;
  }
};

}  // namespace pruneopd
