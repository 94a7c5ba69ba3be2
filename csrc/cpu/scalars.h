// The element types of tensors, one value at a time.
#pragma once

#include <cstdint>

#include "../math/order.h"
#include "operators.h"

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

/// Calls visit with a typed pointer to logits.
template <class Visit>
auto with_logits(const void* data, Scalar type, Visit&& visit) {
  switch (type) {
    case Scalar::kBF16: return visit(static_cast<const BFloat16*>(data));
    case Scalar::kF16: return visit(static_cast<const Half*>(data));
    default: return visit(static_cast<const float*>(data));
  }
}

inline const void* address(const View& view, int64_t offset) {
  static constexpr int64_t kBytes[] = {1, 1, 1, 2, 4, 8, 2, 2, 4, 8};  // in the order of Scalar
  return static_cast<const char*>(view.data) + offset * kBytes[static_cast<int>(view.type)];
}

/// The value at `offset` elements: floating types.
inline double load_real(const View& view, int64_t offset) {
  const void* at = address(view, offset);
  switch (view.type) {
    case Scalar::kF16: return to_float(*static_cast<const Half*>(at));
    case Scalar::kBF16: return to_float(*static_cast<const BFloat16*>(at));
    case Scalar::kF64: return *static_cast<const double*>(at);
    default: return *static_cast<const float*>(at);
  }
}

/// The value at `offset` elements: ids.
inline int64_t load_id(const View& view, int64_t offset) {
  const void* at = address(view, offset);
  return view.type == Scalar::kI32 ? *static_cast<const int32_t*>(at) : *static_cast<const int64_t*>(at);
}

/// Value n of a vector of int32.
inline int32_t load_int32(const View& vector, int64_t n) {
  return static_cast<const int32_t*>(vector.data)[vector.at.offset(n)];
}

/// Whether position n is valid or drifts: any type, non-zero is true; a view that is not given is all true.
inline bool load_flag(const View& view, int64_t n) {
  if (!view) return true;
  const int64_t offset = view.at.offset(n);
  const void* at = address(view, offset);
  switch (view.type) {
    case Scalar::kI16: return *static_cast<const int16_t*>(at) != 0;
    case Scalar::kI32:
    case Scalar::kI64: return load_id(view, offset) != 0;
    case Scalar::kF16:
    case Scalar::kBF16: return (*static_cast<const uint16_t*>(at) & 0x7fff) != 0;  // no subnormal is flushed
    case Scalar::kF32:
    case Scalar::kF64: return load_real(view, offset) != 0;
    default: return *static_cast<const uint8_t*>(at) != 0;
  }
}

/// load_flag of `count` positions from n on.
inline void load_flags(const View& view, int64_t n, int64_t count, bool* flags) {
  if (!view) {
    __builtin_memset(flags, 1, static_cast<size_t>(count));
  } else if (view.type == Scalar::kBool && view.at.dense()) {
    __builtin_memcpy(flags, address(view, n), static_cast<size_t>(count));
  } else {
    for (int64_t i = 0; i < count; ++i) flags[i] = load_flag(view, n + i);
  }
}

}  // namespace pruneopd
