// The order on candidates: descending logit; equal logits, lower id first; -0 == +0; NaN of either sign before
// everything. It is that of torch.sort(descending=True, stable=True).
#pragma once

#include <cstdint>

#include "macros.h"

namespace pruneopd {

PRUNEOPD_FORMULA uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

PRUNEOPD_FORMULA float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t kNaNOrder = 0xffffffffu;

/// Larger comes first. Integers, so that no floating-point mode (flushed subnormals) can touch the order.
PRUNEOPD_FORMULA uint32_t order_of(float x) {
  uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return kNaNOrder;
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The logit of an order (+0 for -0; a NaN for any NaN).
PRUNEOPD_FORMULA float logit_of(uint32_t order) {
  return bits_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

/// A candidate as one integer: the order of its logit above its complemented id. Larger comes first.
using Candidate = uint64_t;

PRUNEOPD_FORMULA Candidate make_candidate(float logit, uint32_t id) {
  return static_cast<uint64_t>(order_of(logit)) << 32 | static_cast<uint32_t>(~id);
}
PRUNEOPD_FORMULA uint32_t candidate_id(Candidate c) { return ~static_cast<uint32_t>(c); }
PRUNEOPD_FORMULA float candidate_logit(Candidate c) { return logit_of(static_cast<uint32_t>(c >> 32)); }

}  // namespace pruneopd
