// What one position of a pair of logits comes to: shared by reliability and token_stats.
#pragma once

#include "row_pass.h"
#include "scalars.h"

namespace pruneopd {

inline Row row_at(const View& logits, double temperature, int64_t n) {
  return {address(logits, logits.at.offset(n)), logits.type, temperature};
}

/// The logit of one id, which the caller knows to be below the vocabulary's size.
inline double logit_at(const Row& row, int64_t id) {
  return with_logits(row.logits, row.type, [&](auto logits) -> double { return to_float(logits[id]); });
}

inline double logprob_at(const Row& row, const RowSummary& summary, int64_t id) {
  return summary.logprob(logit_at(row, id), row.temperature);
}

/// How many of the student's k candidates are among the teacher's.
inline int count_common_candidates(const RowScratch& scratch, int64_t k) {
  IdBlocks student(k);
  int32_t teacher[256];
  for (int64_t j = 0; j < k; ++j) {
    student.ids[j] = static_cast<int32_t>(candidate_id(scratch.student_candidates[j]));
    teacher[j] = static_cast<int32_t>(candidate_id(scratch.teacher_candidates[j]));
  }
  return row_kernels().count_common(student, teacher, k);
}

}  // namespace pruneopd
