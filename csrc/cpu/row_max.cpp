#include "position.h"

namespace pruneopd {

void row_max(const LogitsPair& logits, int64_t positions, float* student_max, float* teacher_max,
             const ParallelFor& parallel_for) {
  parallel_for(positions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      row_kernels().row_max(row_at(logits.student, 1, n), row_at(logits.teacher, 1, n), logits.vocab_size,
                            student_max + n, teacher_max + n);
  });
}

}  // namespace pruneopd
