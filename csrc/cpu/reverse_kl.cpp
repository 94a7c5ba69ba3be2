#include "operators/reverse_kl.h"

#include <cmath>
#include <limits>

#include "gradient_row.h"
#include "position.h"

namespace pruneopd {
namespace {

void pass_position(const ReverseKlArgs& args, int64_t n, RowScratch& scratch) {
  DivergenceState& state = state_at<DivergenceState>(args.out.state, n);
  const double weight = args.weight ? real_at(args.weight, n) : 1;
  args.out.loss[n] = 0;
  state = {};
  if (!load_flag(args.mask, n) || weight == 0) return;
  const RowPairSummary summary = row_kernels().row_pair(row_at(args.student, n), row_at(args.teacher, n),
                                                        args.student.vocab_size, /*k=*/0, Sums::kDivergence, scratch);
  args.out.loss[n] = static_cast<float>(weight * summary.reverse_kl);
  state = DivergenceState::of(summary.student, summary.teacher, summary.reverse_kl, summary.peak_excess);
  if (!std::isfinite(args.out.loss[n])) state.offset = std::numeric_limits<double>::quiet_NaN();
}

void pass_position(const ReverseKlBackwardArgs& args, int64_t n) {
  const double scale = real_at(args.scale, n) / args.student.temperature;
  const GradientRow out(args.gradient, args.student, args.width, n);
  if (scale == 0) return out.clear_from(0);
  const auto saved = [&](int64_t i) { return real_at(args.state, n, i); };
  const DivergenceState state{saved(0), saved(1), saved(2), saved(3), saved(4)};
  if (!(std::isfinite(state.offset) && std::isfinite(scale))) return out.spoil();
  row_kernels().divergence_gradient(row_at(args.student, n), row_at(args.teacher, n), args.student.vocab_size, state,
                                    scale, out.data);
  out.clear_from(out.vocab_size);
}

}  // namespace

template <>
void compute(const ReverseKlArgs& args, const ParallelFor& parallel_for) {
  for_each_position(args.positions, args.student.vocab_size, /*k=*/1, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch); });
}

template <>
void compute(const ReverseKlBackwardArgs& args, const ParallelFor& parallel_for) {
  for_each_gradient(args.positions, parallel_for, [&](int64_t n) { pass_position(args, n); });
}

}  // namespace pruneopd
