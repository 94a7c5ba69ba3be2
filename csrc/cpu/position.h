// What the operators over logits share on the CPU: positions, rows and candidates.
#pragma once

#include "row_pass.h"
#include "scalars.h"

namespace pruneopd {

/// Calls pass(n, scratch) for each position, with working memory for rows of that width and k candidates.
template <class Pass>
void for_each_position(int64_t positions, int64_t vocab_size, int64_t k, const ParallelFor& parallel_for,
                       const Pass& pass) {
  parallel_for(positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    RowMemory memory(vocab_size, k);
    for (int64_t n = begin; n < end; ++n) pass(n, memory.scratch());
  });
}

inline Row row_at(const Logits& logits, int64_t n) {
  return {address(logits.rows, logits.rows.at.offset(n)), logits.rows.type, logits.temperature};
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
