// What a forward pass leaves of a row for its backward pass, and the gradient at one id that follows from it.
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"
#include "softmax.h"

namespace pruneopd {

/// The softmax of a row: p = exp(d) / mass with d = (logit - reference) / temperature, whose mean under p is `mean`.
struct RowState {
  double reference, mass, mean;

  PRUNEOPD_FORMULA static RowState of(const RowSummary& summary) {
    return {summary.reference, exp(summary.log_mass), summary.mean};
  }
};

/// The gradient of KL(p‖q) at an id is p * excess / temperature, with excess = log p - log q - KL
///     = (x - reference) / temperature - (y - teacher_reference) / teacher_temperature - offset.
///
/// If one token has nearly all the mass, its excess is close to 0 although it is a difference of large numbers. The
/// forward pass computes that one from its sums.
struct DivergenceState {
  double reference, mass, teacher_reference, offset, peak_excess;

  PRUNEOPD_FORMULA static DivergenceState of(const RowSummary& student, const RowSummary& teacher, double kl,
                                             double peak_excess) {
    return {student.reference, exp(student.log_mass), teacher.reference, kl + student.log_mass - teacher.log_mass,
            peak_excess};
  }

  /// Whether the reference has most of the mass: then it is the greatest logit, no other equals it, and its excess is
  /// peak_excess.
  PRUNEOPD_FORMULA bool is_peaked() const { return mass < 1.5; }
};

/// How many numbers of a position are saved.
constexpr int64_t kRowState = sizeof(RowState) / sizeof(double),
                  kDivergenceState = sizeof(DivergenceState) / sizeof(double);

/// A state among the outputs, where position n's numbers lie side by side.
template <class State>
PRUNEOPD_FORMULA State& state_at(double* states, int64_t n) {
  return reinterpret_cast<State*>(states)[n];
}

/// Minus the gradient, times the temperature, of `total` log-probabilities and `entropy` entropies, at an id whose own
/// log-probability has no part in them.
PRUNEOPD_FORMULA double softmax_gradient(double logit, const RowState& state, double temperature, double total,
                                         double entropy) {
  const double d = (logit - state.reference) / temperature, p = exp(d) / state.mass;
  return p == 0 ? 0 : p * (total + entropy * (d - state.mean));
}

/// The gradient of KL(p‖q) at an id, times the student's temperature.
PRUNEOPD_FORMULA double divergence_gradient(double logit, double teacher_logit, const DivergenceState& state,
                                            double temperature, double teacher_temperature) {
  const double d = (logit - state.reference) / temperature, p = exp(d) / state.mass;
  if (p == 0) return 0;
  if (state.is_peaked() && d == 0) return p * state.peak_excess;
  return p * (d - (teacher_logit - state.teacher_reference) / teacher_temperature - state.offset);
}

/// The excess of the reference of p's sums, where it is the only logit that equals it; partner_d is the other row's d
/// there. As -sum(p_i * (log p_i / q_i - log p / q at the reference)): nothing cancels but what is summed in float64.
PRUNEOPD_FORMULA double excess_of_peak(const RowSums& p, double temperature, double partner_temperature,
                                       double partner_d) {
  return ((p.other - p.mass * partner_d) / partner_temperature - p.own / temperature) / p.mass;
}

}  // namespace pruneopd
