// Rewards over the student's candidates (Prune-OPD eq. 11): r[j] = w[j] * (log q[j] - log p[j]).
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"

namespace pruneopd {

/// One candidate's reward, in float64 until the weight of its position has multiplied it. `weight` is w[j]; where log q
/// = -inf < log p it is -inf whatever the weight has underflown to.
PRUNEOPD_FORMULA double reward_of(double student_logprob, double teacher_logprob, double weight) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  if (student_logprob == teacher_logprob || student_logprob == -inf) return 0;
  if (teacher_logprob == -inf && student_logprob > -inf) return -inf;
  return weight * (teacher_logprob - student_logprob);
}

/// L * r, rounded once; a weight of 0 silences even a NaN.
PRUNEOPD_FORMULA float weighted_reward(double weight, double reward) {
  return weight == 0 ? 0 : static_cast<float>(weight * reward);
}

}  // namespace pruneopd
