// Finding and sorting the best of some hundred candidates, by counting instead of comparing and branching: on logits a
// branch of a sort is mispredicted every other time, and its loops over whole vectors are not.
//
// Plain loops that the compiler vectorises, forced inline: see simd.h for why no algorithm of the standard library.
#pragma once

#include "../math/order.h"

namespace pruneopd {

/// A value that exactly k of the candidates, which are distinct, are not less than.
PRUNEOPD_FORMULA Candidate kth_best(const Candidate* candidates, int64_t count, int64_t k) {
  Candidate low = 0, high = ~Candidate{0};  // more than k are not less than low, at most k are not less than high
  for (;;) {
    const Candidate middle = high - (high - low) / 2;  // up to high: it is a candidate itself, NaN of id 0
    uint64_t above = 0;
    for (int64_t i = 0; i < count; ++i) above += candidates[i] >= middle;
    if (above == static_cast<uint64_t>(k)) return middle;
    (above > static_cast<uint64_t>(k) ? low : high) = middle;
  }
}

/// Leaves the k best of `count` > k candidates first, in the order that they had; returns the last of them by rank.
PRUNEOPD_FORMULA Candidate keep_best(Candidate* candidates, int64_t count, int64_t k) {
  const Candidate least = kth_best(candidates, count, k);
  int64_t kept = 0;
  Candidate last = ~Candidate{0};
  for (int64_t i = 0; i < count; ++i) {
    const Candidate candidate = candidates[i];
    candidates[kept] = candidate;
    kept += candidate >= least;
    last = candidate >= least && candidate < last ? candidate : last;
  }
  return last;
}

/// Sorts up to 256 distinct candidates, the best first.
PRUNEOPD_FORMULA void sort_candidates(Candidate* candidates, int64_t count) {
  Candidate sorted[256];
  for (int64_t i = 0; i < count; ++i) {
    uint64_t rank = 0;
    for (int64_t j = 0; j < count; ++j) rank += candidates[j] > candidates[i];
    sorted[rank] = candidates[i];
  }
  for (int64_t i = 0; i < count; ++i) candidates[i] = sorted[i];
}

}  // namespace pruneopd
