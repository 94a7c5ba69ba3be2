// The losses at one candidate, and what is left of a row for the backward pass.
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"
#include "softmax.h"

namespace pruneopd {

/// A candidate's term of a loss, and its derivative by the candidate's log-probability.
struct LossTerm {
  double value = 0, derivative = 0;
};

struct PolicyClips {
  double low, high, dual;
};

/// The clipped policy gradient, of a candidate that is no padding. `old` is log p itself where nothing else is given.
/// On ties the derivative is the unclipped branch's; NaN stays NaN where the advantage is not 0.
PRUNEOPD_FORMULA LossTerm policy_term(double logprob, double old, double advantage, const PolicyClips& clips) {
  constexpr double kLargestLogRatio = 20, inf = std::numeric_limits<double>::infinity();
  if (advantage == 0 || logprob == -inf) return {};
  const double log_ratio = logprob - old;
  const bool far = log_ratio > kLargestLogRatio || log_ratio < -kLargestLogRatio;
  const double ratio = exp(!far ? log_ratio : log_ratio > 0 ? kLargestLogRatio : -kLargestLogRatio);
  const double low = 1 - clips.low, high = 1 + clips.high;
  const double unclipped = -advantage * ratio;
  const double clipped = -advantage * (ratio < low ? low : ratio > high ? high : ratio);
  const bool by_ratio = !(unclipped < clipped);
  const double value = by_ratio ? unclipped : clipped;
  if (advantage < 0 && value > -advantage * clips.dual) return {-advantage * clips.dual, 0};
  return {value, by_ratio && !far ? unclipped : 0};
}

/// q (log q - log p), both first raised to `least`, of a candidate that is no padding; and -q, where log p moves it.
PRUNEOPD_FORMULA LossTerm forward_kl_term(double student_logprob, double teacher_logprob, double least) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  const double log_p = student_logprob < least ? least : student_logprob;
  const double log_q = teacher_logprob < least ? least : teacher_logprob;
  if (log_q == -inf) return {student_logprob != student_logprob ? student_logprob : 0, 0};
  const double q = exp(log_q);
  const double derivative = student_logprob < least ? 0 : -q;
  if (log_p == -inf) return {log_q != log_q ? log_q : inf, derivative};
  return {log_p == log_q ? 0 : q * (log_q - log_p), derivative};
}

/// The softmax of a row in float32: p = exp((logit - reference) / temperature) / mass. The losses save it.
struct RowState {
  float reference, mass;

  PRUNEOPD_FORMULA static RowState of(const RowSummary& summary) {
    return {static_cast<float>(summary.reference), static_cast<float>(exp(summary.log_mass))};
  }
};

/// What the gradient of KL(p‖q) is made of: p * excess, with excess = log p - log q - KL
///                                                                = (x - reference) / t - (y - teacher_reference) / t'
///                                                                - offset.
///
/// If one token has nearly all the mass its excess is close to 0 although it is a difference of large numbers, and
/// float32 cannot hold what is left. So the forward pass computes that one from its sums.
struct DivergenceState {
  float reference, mass, teacher_reference, offset, peak_excess;

  PRUNEOPD_FORMULA static DivergenceState of(const RowSummary& student, const RowSummary& teacher, double kl,
                                             double peak_excess) {
    return {static_cast<float>(student.reference), static_cast<float>(exp(student.log_mass)),
            static_cast<float>(teacher.reference), static_cast<float>(kl + student.log_mass - teacher.log_mass),
            static_cast<float>(peak_excess)};
  }

  /// Whether the reference has most of the mass: then it is the greatest logit, no other equals it, and its excess is
  /// peak_excess.
  PRUNEOPD_FORMULA bool is_peaked() const { return mass < 1.5f; }
};

/// How many floats of a position the losses save.
constexpr int64_t kRowState = sizeof(RowState) / sizeof(float),
                  kDivergenceState = sizeof(DivergenceState) / sizeof(float);

/// A state among the outputs, where position n's floats lie side by side.
template <class State>
PRUNEOPD_FORMULA State& state_at(float* states, int64_t n) {
  return reinterpret_cast<State*>(states)[n];
}

/// The excess of the reference of p's sums, where it is the only logit that equals it; partner_d is the other row's d
/// there. As -sum(p_i * (log p_i / q_i - log p / q at the reference)): nothing cancels but what is summed in float64.
PRUNEOPD_FORMULA double excess_of_peak(const RowSums& p, double temperature, double partner_temperature,
                                       double partner_d) {
  return ((p.other - p.mass * partner_d) / partner_temperature - p.own / temperature) / p.mass;
}

}  // namespace pruneopd
