// How a row is walked: two vectors a step. Include it only from a source that is compiled once for each instruction
// set.
#pragma once

#include <type_traits>

#include "../math/softmax.h"
#include "simd.h"

namespace pruneopd::PRUNEOPD_ISA {

constexpr int64_t kPrefetchBytes = 4096;  // the hardware prefetcher stops at the end of a page

/// Elements that one step of a loop takes from a row.
constexpr int64_t kStep = 2 * kLanes;

/// What a difference of logits is multiplied by to be in log2 units.
PRUNEOPD_INLINE float log2_scale(double temperature) { return static_cast<float>(1 / (kLn2 * temperature)); }
PRUNEOPD_INLINE bool is_usable_scale(float scale) { return scale > 1e-9f && scale < 1e9f; }

/// exp2_scaled gives 0 below 2**-126. If the other row's log-probability there is as far down as 2**60, their product
/// counts all the same: finite logits like -1e38 next to modest ones. Where no product of both rows' d reaches this
/// limit, no such term is lost; else loses_terms() looks closely.
PRUNEOPD_INLINE float limit_of_products(float scale, float partner_scale) {
  return static_cast<float>(0x1p66 / (static_cast<double>(scale) * partner_scale));
}

/// Whether such a term is among these ids.
template <class TX, class TY>
__attribute__((noinline)) bool loses_terms(const TX* x, const TY* y, int64_t count, float reference,
                                           float partner_reference, float scale, float partner_scale) {
  const auto is_lost = [](double a, double b) {  // 2**-1074 is the least of float64
    return a < -125 && a > -1075 && b < -0x1p58 && b > -__builtin_inf();
  };
  bool lost = false;
  for (int64_t i = 0; i < count; ++i) {
    const double a = (static_cast<double>(to_float(x[i])) - reference) * scale;
    const double b = (static_cast<double>(to_float(y[i])) - partner_reference) * partner_scale;
    lost |= is_lost(a, b) || is_lost(b, a);
  }
  return lost;
}

/// Two vectors of a row; out of order where that is cheaper and nothing depends on it.
template <bool kInOrder, class T>
PRUNEOPD_INLINE void load_two(const T* p, Vec (&v)[2]) {
  v[0] = load(p);
  v[1] = load(p + kLanes);
}
template <>
PRUNEOPD_INLINE void load_two<false, BFloat16>(const BFloat16* p, Vec (&v)[2]) {
  load_even_odd(p, v[0], v[1]);
}

template <class T>
PRUNEOPD_INLINE void prefetch_ahead(const T* p) {
  constexpr int64_t kBytes = kStep * static_cast<int64_t>(sizeof(T));
  for (int64_t line = 0; line < kBytes; line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + line, 0, 3);
}

PRUNEOPD_INLINE int64_t whole_steps(int64_t count) { return (count + kStep - 1) / kStep * kStep; }

/// The end of a row, filled up to whole steps with -inf, which is in no sum and no maximum.
template <class T, int64_t kSize>
struct Padded {
  T data[kSize];

  PRUNEOPD_INLINE Padded(const T* from, int64_t count) {
    __builtin_memcpy(data, from, static_cast<size_t>(count) * sizeof(T));
    for (int64_t i = count; i < whole_steps(count); ++i) data[i] = from_float<T>(kNegativeInfinity);
  }
};

}  // namespace pruneopd::PRUNEOPD_ISA
