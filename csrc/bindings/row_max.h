// row_max over torch's tensors, for the benchmarks: it only reads the logits.
#pragma once

#include <tuple>

#include "bindings/guard.h"
#include "bindings/output.h"
#include "cpu/operators.h"

namespace pruneopd::bindings {

template <class World, class Tensor = typename World::Tensor>
auto row_max(const World& world, const Tensor& student_logits, const Tensor& teacher_logits) {
  const Array student = World::describe(student_logits);

  RowMaxArgs args;
  args.logits = Guard("row_max", world.device())
                    .logits(student, World::describe(teacher_logits), 1, 1, std::nullopt, /*along_responses=*/false);
  const Shape positions = without_last(student.shape);
  args.positions = count(positions);
  Output<World, float> student_max(world, positions), teacher_max(world, positions);
  args.student_max = student_max;
  args.teacher_max = teacher_max;
  world.compute(args);
  return std::tuple(student_max.tensor, teacher_max.tensor);
}

}  // namespace pruneopd::bindings
