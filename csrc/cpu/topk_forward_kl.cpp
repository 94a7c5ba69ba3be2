#include "operators/topk_forward_kl.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../math/drift.h"
#include "position.h"

namespace pruneopd {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void write_masked(const TopkForwardKlArgs::Outputs& out, int64_t n, int64_t k) {
  for (float* floats : {out.loss, out.student_mass, out.teacher_mass, out.overlap, out.overlap_token_advantage})
    floats[n] = 0;
  for (int64_t j = 0; j < k; ++j) out.student_topk_ids[n * k + j] = j;
  std::fill_n(out.coefficients + n * k, k, 0.0f);
  state_at<RowState>(out.state, n) = {};
}

/// What the teacher's candidates of a position add up to.
struct Sums {
  double loss = 0, student_mass = 0, teacher_mass = 0, shared = 0;
  int shared_slots = 0;
};

/// Writes the coefficients and adds up; `student` are the student's own candidates.
Sums sum_candidates(const TopkForwardKlArgs& args, int64_t n, const Row& row, const RowSummary& summary,
                    const IdBlocks& student) {
  Sums sums;
  for (int64_t j = 0; j < args.k; ++j) {
    float& coefficient = args.out.coefficients[n * args.k + j];
    const int64_t id = id_at(args.teacher_topk_ids, n, j);
    coefficient = 0;
    if (id < 0) continue;  // padding
    const bool exists = id < args.student.vocab_size;
    const double log_p = exists ? logprob_at(row, summary, id) : kNaN;
    const double log_q = real_at(args.teacher_topk_logprobs, n, j);
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
  int32_t teacher[kMaxCandidates];
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t id = id_at(args.teacher_topk_ids, n, j);
    teacher[j] = id >= 0 && id < args.student.vocab_size ? static_cast<int32_t>(id) : -2;  // which occurs nowhere
  }
  return row_kernels().count_common(student, teacher, args.k);
}

void pass_position(const TopkForwardKlArgs& args, int64_t n, RowScratch& scratch) {
  const TopkForwardKlArgs::Outputs& out = args.out;
  const int64_t k = args.k;
  if (!load_flag(args.mask, n)) return write_masked(out, n, k);
  const Row row = row_at(args.student, n);
  const RowSummary summary = row_kernels().row(row, args.student.vocab_size, k, scratch);
  IdBlocks student(k);
  for (int64_t j = 0; j < k; ++j) {
    student.ids[j] = static_cast<int32_t>(candidate_id(scratch.student_candidates[j]));
    out.student_topk_ids[n * k + j] = student.ids[j];
  }
  const Sums sums = sum_candidates(args, n, row, summary, student);
  const int common = summary.broken ? 0 : count_common(args, n, student);
  out.overlap[n] = static_cast<float>(overlap_of(common, static_cast<int>(k)));
  out.loss[n] = summary.broken ? kNaN : static_cast<float>(sums.loss);
  out.student_mass[n] = summary.broken ? kNaN : static_cast<float>(sums.student_mass);
  out.teacher_mass[n] = static_cast<float>(sums.teacher_mass);
  out.overlap_token_advantage[n] =
      summary.broken ? kNaN : static_cast<float>(sums.shared / std::max(sums.shared_slots, 1));
  if (!std::isfinite(out.loss[n])) std::fill_n(out.coefficients + n * k, k, kNaN);
  state_at<RowState>(out.state, n) = RowState::of(summary);
}

}  // namespace

template <>
void compute(const TopkForwardKlArgs& args, const ParallelFor& parallel_for) {
  for_each_position(args.positions, args.student.vocab_size, args.k, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch); });
}

}  // namespace pruneopd
