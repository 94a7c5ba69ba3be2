// What makes a position drift: too small an overlap (Prune-OPD eq. 6, 7), or a token outside of the teacher's nucleus
// (eq. 14-16).
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace pruneopd {

/// Overlap O of `count` common candidates, exact until the one rounding to float32 of whoever stores it.
PRUNEOPD_FORMULA double overlap_of(int count, int k) { return static_cast<double>(count) / k; }

PRUNEOPD_FORMULA bool drifts_by_overlap(int count, int k, double threshold) { return overlap_of(count, k) < threshold; }

/// Whether a token lies in the shortest prefix of the teacher's candidates whose mass reaches top_p. Feed the
/// candidates in order; a padding slot is left out, a NaN mass rejects the token for good.
struct Nucleus {
  double bound;  // top_p - 1e-6
  double mass = 0;
  bool closed = false, accepted = false, broken = false;

  PRUNEOPD_FORMULA explicit Nucleus(double top_p) : bound(top_p - 1e-6) {}

  PRUNEOPD_FORMULA void add_mass(double candidate_mass, bool is_token) {
    if (candidate_mass != candidate_mass) broken = true;
    if (closed) return;
    accepted |= is_token;
    mass += candidate_mass;
    closed = mass >= bound;
  }
  PRUNEOPD_FORMULA void add(double logprob, bool is_token) {
    if (!closed || logprob != logprob) add_mass(exp(logprob), is_token);
  }
  PRUNEOPD_FORMULA bool accepts() const { return accepted && !broken; }
};

}  // namespace pruneopd
