// What the operators over logits share on the CPU: positions, rows and candidates.
#pragma once

#include <limits>

#include "../math/drift.h"
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

/// How many of a row's k candidates are no empty slots, whose logit is -inf and which come last.
inline int count_filled(const Candidate* candidates, int64_t k) {
  while (k > 0 && candidate_logit(candidates[k - 1]) == -std::numeric_limits<float>::infinity()) --k;
  return static_cast<int>(k);
}

/// The overlap of both rows' candidates, of which so many are filled.
inline double overlap_of(const RowScratch& scratch, int student_size, int teacher_size) {
  IdBlocks student(student_size);
  int32_t teacher[256];
  for (int j = 0; j < student_size; ++j)
    student.ids[j] = static_cast<int32_t>(candidate_id(scratch.student_candidates[j]));
  for (int j = 0; j < teacher_size; ++j) teacher[j] = static_cast<int32_t>(candidate_id(scratch.teacher_candidates[j]));
  return overlap_of(row_kernels().count_equal(student, teacher, teacher_size), student_size, teacher_size);
}

}  // namespace pruneopd
