#include <algorithm>
#include <cmath>
#include <limits>

#include "../math/drift.h"
#include "position.h"

namespace pruneopd {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void write_masked(const TopkForwardKlArgs& args, int64_t n) {
  for (float* floats : {args.loss, args.student_mass, args.teacher_mass, args.overlap, args.overlap_token_advantage})
    floats[n] = 0;
  for (int64_t j = 0; j < args.k; ++j) args.student_topk_ids[n * args.k + j] = j;
  std::fill_n(args.coefficients + n * args.k, args.k, 0.0f);
  std::fill_n(args.state + n * kRowState, kRowState, 0.0f);
}

/// What the teacher's candidates of a position add up to.
struct Sums {
  double loss = 0, student_mass = 0, teacher_mass = 0, shared = 0;
  int shared_slots = 0;
};

/// Writes the coefficients and adds up; `student` are the student's own candidates.
Sums sum_candidates(const TopkForwardKlArgs& args, int64_t n, const Row& row, const RowSummary& summary,
                    const IdBlocks& student) {
  const View &ids = args.teacher_topk_ids, &logprobs = args.teacher_topk_logprobs;
  const int64_t first_id = ids.at.offset(n), first_logprob = logprobs.at.offset(n);
  Sums sums;
  for (int64_t j = 0; j < args.k; ++j) {
    float& coefficient = args.coefficients[n * args.k + j];
    const int64_t id = load_id(ids, first_id + j * ids.step);
    coefficient = 0;
    if (id < 0) continue;  // padding
    const bool exists = id < args.student.vocab_size;
    const double log_p = exists ? logprob_at(row, summary, id) : kNaN;
    const double log_q = load_real(logprobs, first_logprob + j * logprobs.step);
    const LossTerm term = forward_kl_term(log_p, log_q, args.logprob_min);
    sums.loss += term.value;
    sums.student_mass += std::exp(log_p);
    sums.teacher_mass += std::exp(log_q);
    coefficient = static_cast<float>(term.derivative);
    if (exists && std::find(student.ids, student.ids + args.k, static_cast<int32_t>(id)) != student.ids + args.k) {
      sums.shared -= term.value;
      ++sums.shared_slots;
    }
  }
  return sums;
}

/// How many of the student's candidates are among the teacher's.
int count_common(const TopkForwardKlArgs& args, int64_t n, const IdBlocks& student) {
  const View& ids = args.teacher_topk_ids;
  int32_t teacher[kMaxCandidates];
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t id = load_id(ids, ids.at.offset(n) + j * ids.step);
    teacher[j] = id >= 0 && id < args.student.vocab_size ? static_cast<int32_t>(id) : -2;  // which occurs nowhere
  }
  return row_kernels().count_common(student, teacher, args.k);
}

void pass_position(const TopkForwardKlArgs& args, int64_t n, RowScratch& scratch) {
  if (!load_flag(args.mask, n)) return write_masked(args, n);
  const int64_t k = args.k;
  const Row row = row_at(args.student.rows, args.student.temperature, n);
  const RowSummary summary = row_kernels().row(row, args.student.vocab_size, k, scratch);
  IdBlocks student(k);
  for (int64_t j = 0; j < k; ++j) {
    student.ids[j] = static_cast<int32_t>(candidate_id(scratch.student_candidates[j]));
    args.student_topk_ids[n * k + j] = student.ids[j];
  }
  const Sums sums = sum_candidates(args, n, row, summary, student);
  const int common = summary.broken ? 0 : count_common(args, n, student);
  args.overlap[n] = static_cast<float>(overlap_of(common, static_cast<int>(k)));
  args.loss[n] = summary.broken ? kNaN : static_cast<float>(sums.loss);
  args.student_mass[n] = summary.broken ? kNaN : static_cast<float>(sums.student_mass);
  args.teacher_mass[n] = static_cast<float>(sums.teacher_mass);
  args.overlap_token_advantage[n] =
      summary.broken ? kNaN : static_cast<float>(sums.shared / std::max(sums.shared_slots, 1));
  if (!std::isfinite(args.loss[n])) std::fill_n(args.coefficients + n * k, k, kNaN);
  const RowState saved(summary);
  args.state[n * kRowState] = saved.reference;
  args.state[n * kRowState + 1] = saved.mass;
}

}  // namespace

void compute(const TopkForwardKlArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    RowMemory memory(args.student.vocab_size, args.k);
    for (int64_t n = begin; n < end; ++n) pass_position(args, n, memory.scratch());
  });
}

}  // namespace pruneopd
