#include <algorithm>
#include <cmath>
#include <limits>

#include "gradient_row.h"
#include "position.h"

namespace pruneopd {
namespace {

void pass_position(const ReverseKlArgs& args, int64_t n, RowScratch& scratch) {
  float* const state = args.state + n * kDivergenceState;
  const double weight = args.weight ? load_real(args.weight, args.weight.at.offset(n)) : 1;
  if (!load_flag(args.mask, n) || weight == 0) {
    args.loss[n] = 0;
    std::fill_n(state, kDivergenceState, 0.0f);
    return;
  }
  const LogitsPair& logits = args.logits;
  const RowPairSummary summary =
      row_kernels().divergence(row_at(logits.student, logits.student_temperature, n),
                               row_at(logits.teacher, logits.teacher_temperature, n), logits.vocab_size, scratch);
  args.loss[n] = static_cast<float>(weight * summary.reverse_kl);
  const DivergenceState saved(summary.student, summary.teacher, summary.reverse_kl, summary.peak_excess);
  state[0] = saved.reference;
  state[1] = saved.mass;
  state[2] = saved.teacher_reference;
  state[3] = std::isfinite(args.loss[n]) ? saved.offset : std::numeric_limits<float>::quiet_NaN();
  state[4] = saved.peak_excess;
}

void pass_position(const ReverseKlBackwardArgs& args, int64_t n) {
  const LogitsPair& logits = args.logits;
  const double scale = load_real(args.scale, args.scale.at.offset(n)) / logits.student_temperature;
  const GradientRow out(args.gradient, logits.student.type, logits.vocab_size, args.width, n);
  if (scale == 0) return out.clear_from(0);
  const auto saved = [&](int64_t i) {
    return static_cast<float>(load_real(args.state, args.state.at.offset(n) + i * args.state.step));
  };
  const DivergenceState state(saved(0), saved(1), saved(2), saved(3), saved(4));
  if (!(std::isfinite(state.offset) && std::isfinite(scale))) return out.spoil();
  row_kernels().divergence_gradient(row_at(logits.student, logits.student_temperature, n),
                                    row_at(logits.teacher, logits.teacher_temperature, n), logits.vocab_size, state,
                                    scale, out.data);
  out.clear_from(out.vocab_size);
}

}  // namespace

void compute(const ReverseKlArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    RowMemory memory(args.logits.vocab_size, /*k=*/1);
    for (int64_t n = begin; n < end; ++n) pass_position(args, n, memory.scratch());
  });
}

void compute(const ReverseKlBackwardArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    for (int64_t n = begin; n < end; ++n) pass_position(args, n);
  });
}

}  // namespace pruneopd
