// What makes a position drift: too small an overlap (Prune-OPD eq. 6, 7), or a token outside of the teacher's nucleus
// (eq. 14-16).
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace pruneopd {

/// Overlap O of `count` common candidates, in float64: a position drifts if it is less than the threshold. Empty slots
/// are not counted in the sizes; where both sets are empty there is no overlap.
PRUNEOPD_FORMULA double overlap_of(int count, int student_size, int teacher_size) {
  const int size = student_size > teacher_size ? student_size : teacher_size;
  return size > 0 ? static_cast<double>(count) / size : 0;
}

/// Whether a token lies in the shortest prefix of the teacher's candidates whose mass reaches top_p, or with top_p = 1
/// anywhere among them. Feed the candidates in order; an empty slot is left out, a NaN mass rejects the token for good.
struct Nucleus {
  double bound;
  double mass = 0;
  bool closed = false, accepted = false, broken = false;

  PRUNEOPD_FORMULA explicit Nucleus(double top_p) : bound(top_p < 1 ? top_p - 1e-6 : INFINITY) {}

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
