#include "operators/row_max.h"

#include "position.h"

namespace pruneopd {

template <>
void compute(const RowMaxArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      row_kernels().row_max(row_at(args.student, n), row_at(args.teacher, n), args.student.vocab_size,
                            args.student_max + n, args.teacher_max + n);
  });
}

}  // namespace pruneopd
