// The element types of tensors, one value at a time.
#pragma once

#include <cstdint>

#include "../views.h"
#include "order.h"

namespace pruneopd {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PRUNEOPD_FORMULA float to_float(float x) { return x; }
PRUNEOPD_FORMULA float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
PRUNEOPD_FORMULA float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  if (rest >= 0x0400u) return bits_float(sign | ((rest << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;  // exact
  return bits_float(sign | float_bits(subnormal));
}

/// The nearest value of a type, of two the even one; NaN stays NaN.
template <class T>
PRUNEOPD_FORMULA T from_float(float x);
template <>
PRUNEOPD_FORMULA float from_float<float>(float x) {
  return x;
}
template <>
PRUNEOPD_FORMULA BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
PRUNEOPD_FORMULA Half from_float<Half>(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 2^16 and more, infinity
  if (rest >= 0x38800000u) {  // 2^-14: the exponent has room; from 65520 on, rounding leads to infinity
    const uint32_t rebased = rest - 0x38000000u;
    return {static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1)) >> 13)};
  }
  // Subnormal: the last bit is worth 2^-24. Adding 0.5, whose last bit is too, rounds; no subnormal float32 appears.
  const float shifted = bits_float(rest) + 0.5f;
  return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u))};
}

PRUNEOPD_FORMULA int64_t bytes_of(Scalar type) {
  switch (type) {
    case Scalar::kI16:
    case Scalar::kF16:
    case Scalar::kBF16: return 2;
    case Scalar::kI32:
    case Scalar::kF32: return 4;
    case Scalar::kI64:
    case Scalar::kF64: return 8;
    default: return 1;
  }
}

/// The value at `offset` elements: floating types.
PRUNEOPD_FORMULA double load_real(const void* data, Scalar type, int64_t offset) {
  switch (type) {
    case Scalar::kF16: return to_float(static_cast<const Half*>(data)[offset]);
    case Scalar::kBF16: return to_float(static_cast<const BFloat16*>(data)[offset]);
    case Scalar::kF64: return static_cast<const double*>(data)[offset];
    default: return static_cast<const float*>(data)[offset];
  }
}

/// The value at `offset` elements: ids.
PRUNEOPD_FORMULA int64_t load_id(const void* data, Scalar type, int64_t offset) {
  return type == Scalar::kI32 ? static_cast<const int32_t*>(data)[offset] : static_cast<const int64_t*>(data)[offset];
}

/// Whether the value at `offset` elements is not zero: any type. Floats by their bits, because a processor may be set
/// to take subnormals for zeros.
PRUNEOPD_FORMULA bool load_flag(const void* data, Scalar type, int64_t offset) {
  switch (type) {
    case Scalar::kI16: return static_cast<const int16_t*>(data)[offset] != 0;
    case Scalar::kI32:
    case Scalar::kI64: return load_id(data, type, offset) != 0;
    case Scalar::kF16:
    case Scalar::kBF16: return static_cast<const uint16_t*>(data)[offset] << 1 & 0xffff;
    case Scalar::kF32: return static_cast<const uint32_t*>(data)[offset] << 1;
    case Scalar::kF64: return static_cast<const uint64_t*>(data)[offset] << 1;
    default: return static_cast<const uint8_t*>(data)[offset] != 0;
  }
}

}  // namespace pruneopd
