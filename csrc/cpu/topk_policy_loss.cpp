#include "operators/topk_policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "position.h"

namespace pruneopd {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

bool counts(const TopkPolicyLossArgs& args, int64_t n, int64_t j) {
  return id_at(args.topk_ids, n, j) >= 0 && real_at(args.advantages, n, j) != 0;
}

bool has_candidates(const TopkPolicyLossArgs& args, int64_t n) {
  for (int64_t j = 0; j < args.m; ++j)
    if (counts(args, n, j)) return true;
  return false;
}

void pass_position(const TopkPolicyLossArgs& args, int64_t n, RowScratch& scratch) {
  float* const coefficients = args.out.coefficients + n * args.m;
  std::fill_n(coefficients, args.m, 0.0f);
  args.out.loss[n] = 0;
  RowState& state = state_at<RowState>(args.out.state, n);
  state = {};
  if (!load_flag(args.mask, n) || !has_candidates(args, n)) return;

  const Row row = row_at(args.student, n);
  const RowSummary summary = row_kernels().row(row, args.student.vocab_size, /*k=*/0, scratch);
  double loss = 0;
  for (int64_t j = 0; j < args.m; ++j) {
    if (!counts(args, n, j)) continue;
    const int64_t id = id_at(args.topk_ids, n, j);
    const double logprob = id < args.student.vocab_size ? logprob_at(row, summary, id) : kNaN;
    const double old = args.old_logprobs ? real_at(args.old_logprobs, n, j) : logprob;
    const LossTerm term = policy_term(logprob, old, real_at(args.advantages, n, j), args.clips);
    loss += term.value;
    coefficients[j] = static_cast<float>(term.derivative);
  }
  args.out.loss[n] = static_cast<float>(loss);
  if (!std::isfinite(args.out.loss[n])) std::fill_n(coefficients, args.m, kNaN);
  state = RowState::of(summary);
}

}  // namespace

template <>
void compute(const TopkPolicyLossArgs& args, const ParallelFor& parallel_for) {
  for_each_position(args.positions, args.student.vocab_size, /*k=*/1, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch); });
}

}  // namespace pruneopd
