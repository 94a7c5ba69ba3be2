// Along a response: cumulative drift C, reliability R, weight L, effective length E (Prune-OPD eq. 8-10, 12).
//
// Compile with floating-point contraction off: a fused multiply-add in 1 - w_drop * C changes R.
#pragma once

#include <cstdint>

#include "macros.h"

namespace pruneopd {

/// C (eq. 8) as stored: int32, saturated.
PRUNEOPD_FORMULA int32_t stored_count(int64_t drift_count) {
  return drift_count > INT32_MAX ? INT32_MAX : static_cast<int32_t>(drift_count);
}

/// R (eq. 9) in float64: the product is rounded before the difference.
PRUNEOPD_FORMULA double reliability_of(int32_t drift_count, double w_drop) {
  const double lost = w_drop * drift_count;
  const double left = 1.0 - lost;
  return left > 0 ? left : 0.0;
}

/// L (eq. 10).
PRUNEOPD_FORMULA double weight_of(double reliability, double w_base) { return reliability + w_base; }

/// Whether a valid position counts towards E (eq. 12).
PRUNEOPD_FORMULA bool is_effective(double reliability, double eps) { return reliability > eps; }

}  // namespace pruneopd
