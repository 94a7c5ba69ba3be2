#include <algorithm>
#include <limits>

#include "../math/drift.h"
#include "position.h"

namespace pruneopd {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Ids, their log-probabilities in their own row and in the other's.
void write_candidates(const Candidate* candidates, int64_t k, const Row& own, const RowSummary& own_summary,
                      const Row& other, const RowSummary& other_summary, int64_t* ids, float* logprobs,
                      float* other_logprobs) {
  for (int64_t j = 0; j < k; ++j) {
    ids[j] = candidate_id(candidates[j]);
    logprobs[j] = static_cast<float>(own_summary.logprob(candidate_logit(candidates[j]), own.temperature));
    other_logprobs[j] = static_cast<float>(logprob_at(other, other_summary, ids[j]));
  }
}

void write_masked(const TokenStatsArgs& args, int64_t n) {
  const int64_t first = n * args.k;
  for (int64_t* ids : {args.student_topk_ids, args.teacher_topk_ids})
    for (int64_t j = 0; j < args.k; ++j) ids[first + j] = j;
  for (float* floats : {args.student_topk_logprobs, args.teacher_topk_logprobs, args.teacher_on_student_logprobs,
                        args.student_on_teacher_logprobs})
    std::fill_n(floats + first, args.k, 0.0f);
  for (float* floats : {args.overlap, args.student_lse, args.teacher_lse, args.student_entropy, args.teacher_entropy,
                        args.reverse_kl, args.forward_kl, args.student_token_logprob, args.teacher_token_logprob})
    floats[n] = 0;
}

void pass_position(const TokenStatsArgs& args, int64_t n, RowScratch& scratch) {
  if (!load_flag(args.mask, n)) return write_masked(args, n);
  const int64_t k = args.k, first = n * k;
  const Row student = row_at(args.logits.student, args.logits.student_temperature, n);
  const Row teacher = row_at(args.logits.teacher, args.logits.teacher_temperature, n);
  const RowPairSummary summary = row_kernels().row_pair(student, teacher, args.logits.vocab_size, k, true, scratch);
  write_candidates(scratch.student_candidates, k, student, summary.student, teacher, summary.teacher,
                   args.student_topk_ids + first, args.student_topk_logprobs + first,
                   args.teacher_on_student_logprobs + first);
  write_candidates(scratch.teacher_candidates, k, teacher, summary.teacher, student, summary.student,
                   args.teacher_topk_ids + first, args.teacher_topk_logprobs + first,
                   args.student_on_teacher_logprobs + first);
  const int common = summary.broken() ? 0 : count_common_candidates(scratch, k);
  args.overlap[n] = static_cast<float>(overlap_of(common, static_cast<int>(k)));
  args.student_lse[n] = static_cast<float>(summary.student.lse);
  args.teacher_lse[n] = static_cast<float>(summary.teacher.lse);
  args.student_entropy[n] = static_cast<float>(summary.student.entropy);
  args.teacher_entropy[n] = static_cast<float>(summary.teacher.entropy);
  args.reverse_kl[n] = static_cast<float>(summary.reverse_kl);
  args.forward_kl[n] = static_cast<float>(summary.forward_kl);

  const int64_t token = args.token_ids ? load_id(args.token_ids, args.token_ids.at.offset(n)) : -1;
  const bool exists = token >= 0 && token < args.logits.vocab_size;
  args.student_token_logprob[n] = exists ? static_cast<float>(logprob_at(student, summary.student, token)) : kNaN;
  args.teacher_token_logprob[n] = exists ? static_cast<float>(logprob_at(teacher, summary.teacher, token)) : kNaN;
}

}  // namespace

void compute(const TokenStatsArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    RowMemory memory(args.logits.vocab_size, args.k);
    for (int64_t n = begin; n < end; ++n) pass_position(args, n, memory.scratch());
  });
}

}  // namespace pruneopd
