// Along a response: cumulative drift C, reliability R, weight L, effective length E (Prune-OPD eq. 8-10, 12).
//
// Compile with floating-point contraction off: a fused multiply-add in 1 - w_drop * C changes R.
#pragma once

#include <cstdint>

#include "macros.h"

namespace pruneopd {

/// R (eq. 9) in float64: the product is rounded before the difference.
PRUNEOPD_FORMULA double reliability_of(int64_t drift_count, double w_drop) {
  const double lost = w_drop * static_cast<double>(drift_count);
  const double left = 1.0 - lost;
  return left > 0 ? left : 0.0;
}

struct ScanState {
  int64_t drift_count = 0;  // C
  int32_t effective_length = 0;
  double reliability = 0;  // of the last position, 0 where masked
  float weight = 0;

  PRUNEOPD_FORMULA void step(bool valid, bool drift, double w_drop, double w_base, double eps) {
    if (!valid) {
      reliability = 0;
      weight = 0;
      return;
    }
    drift_count += drift;
    reliability = reliability_of(drift_count, w_drop);
    weight = static_cast<float>(reliability + w_base);
    effective_length += reliability > eps;
  }
  /// C as stored: int32, saturated.
  PRUNEOPD_FORMULA int32_t stored_count() const {
    return drift_count > INT32_MAX ? INT32_MAX : static_cast<int32_t>(drift_count);
  }
};

}  // namespace pruneopd
