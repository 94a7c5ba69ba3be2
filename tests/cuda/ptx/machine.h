// What the lines of translate.py are made of: PTX instructions that are no operator of C++, for one thread.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda_runtime.h"
#include "math/scalars.h"

namespace pruneopd::cuda {
extern unsigned char shared_memory[];
}

namespace ptx {

const uint64_t shared = reinterpret_cast<uint64_t>(pruneopd::cuda::shared_memory);
const emulator::Place kBarrier = emulator::Place::current();  // one for all: nvcc may copy a barrier

template <class To, class From>
To as(From bits) {
  return std::bit_cast<To>(bits);
}

/// An access of `count` values at once, which the hardware refuses if it is misaligned.
template <class T, int kCount>
T* address(uint64_t base, int64_t offset) {
  const uint64_t at = base + static_cast<uint64_t>(offset);
  if (at % (sizeof(T) * kCount)) emulator::misaligned(at, static_cast<int>(sizeof(T) * kCount));
  return reinterpret_cast<T*>(at);
}

// --- numbers -------------------------------------------------------------------------------------------------------

template <class T>
struct Pair {
  T low, high;
  static Pair of(float high, float low) { return {pruneopd::from_float<T>(low), pruneopd::from_float<T>(high)}; }
};

template <class To, class From>
To converted(From x) {
  if constexpr (sizeof(From) == 2 && !std::is_integral_v<From>)
    return converted<To>(pruneopd::to_float(x));
  else if constexpr (std::is_arithmetic_v<To>)
    return static_cast<To>(x);
  else
    return pruneopd::from_float<To>(x);
}

/// Towards zero; the nearest integer that there is.
template <class T, class F>
T to_integer(F x) {
  if (std::isnan(x)) return sizeof(T) == 8 ? static_cast<T>(uint64_t{1} << 63) : 0;
  if (x >= static_cast<F>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  if (x <= static_cast<F>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  return static_cast<T>(x);
}

/// The larger or the lesser one, of zeros by their sign; kNaN: NaN if either is, else the other one.
template <bool kLarger, bool kNaN, class T>
T extreme(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return (a < b) == kLarger ? b : a;
  } else if constexpr (std::is_floating_point_v<T>) {
    if (a != a || b != b) return kNaN || (a != a && b != b) ? std::numeric_limits<T>::quiet_NaN() : a != a ? b : a;
    if (a == b) return std::signbit(a) == kLarger ? b : a;
    return (a < b) == kLarger ? b : a;
  } else {
    const auto one = [](auto x, auto y) {
      const float of_x = pruneopd::to_float(x), of_y = pruneopd::to_float(y);
      const float z = extreme<kLarger, kNaN>(of_x, of_y);
      return z != z ? decltype(x){0x7fff} : std::bit_cast<uint32_t>(z) == std::bit_cast<uint32_t>(of_x) ? x : y;
    };
    return {one(a.low, b.low), one(a.high, b.high)};
  }
}

/// Exact to the last bit or nearly so; the hardware's own last bits are not known.
inline float exp2_approximately(float x) {
  const auto y = static_cast<float>(std::exp2(static_cast<double>(x)));
  return y < 0x1p-126f ? 0 : y;
}
inline double reciprocal_approximately(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / x) & 0xffffffff00000000u);
}

// --- bits ----------------------------------------------------------------------------------------------------------

inline bool complement(bool x) { return !x; }
template <class T>
T complement(T x) {
  return static_cast<T>(~x);
}
template <class T>
T shifted_left(T x, uint32_t bits) {
  return bits >= sizeof(T) * 8 ? T{0} : static_cast<T>(static_cast<uint64_t>(x) << bits);
}
template <class T>
T shifted_right(T x, uint32_t bits) {
  return bits >= sizeof(T) * 8 ? static_cast<T>(x < 0 ? -1 : 0) : static_cast<T>(x >> bits);
}
template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> sizeof(T) * 8);
}
template <class T>
T insert_bits(T bits, T into, uint32_t first, uint32_t count) {
  const T ones = count >= sizeof(T) * 8 ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << count) - 1);
  const T mask = shifted_left(ones, first);
  return static_cast<T>((into & ~mask) | (shifted_left(bits, first) & mask));
}
inline uint32_t reversed(uint32_t x) {
  uint32_t y = 0;
  for (int bit = 0; bit < 32; ++bit) y |= (x >> bit & 1) << (31 - bit);
  return y;
}
inline uint32_t permuted_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t y = 0;
  for (int n = 0; n < 4; ++n) {
    const uint32_t selector = selectors >> 4 * n & 0xf;
    const auto byte = static_cast<uint8_t>((uint64_t{b} << 32 | a) >> 8 * (selector & 7));
    y |= uint32_t{selector & 8 ? static_cast<uint8_t>(byte & 0x80 ? 0xff : 0) : byte} << 8 * n;
  }
  return y;
}

}  // namespace ptx
