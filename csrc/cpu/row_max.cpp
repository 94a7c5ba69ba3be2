#include "position.h"

namespace pruneopd {

void compute(const RowMaxArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      row_kernels().row_max(row_at(args.logits.student, 1, n), row_at(args.logits.teacher, 1, n),
                            args.logits.vocab_size, args.student_max + n, args.teacher_max + n);
  });
}

}  // namespace pruneopd
