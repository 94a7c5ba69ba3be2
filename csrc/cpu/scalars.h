// The elements of views, one value at a time.
#pragma once

#include <cstdint>

#include "../math/scalars.h"
#include "views.h"

namespace pruneopd {

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
  return static_cast<const char*>(view.data) + offset * bytes_of(view.type);
}

/// Value j of position n: floating types.
inline double real_at(const View& view, int64_t n, int64_t j = 0) {
  return load_real(view.data, view.type, view.at.offset(n) + j * view.step);
}

/// Value j of position n: ids and counts.
inline int64_t id_at(const View& view, int64_t n, int64_t j = 0) {
  return load_id(view.data, view.type, view.at.offset(n) + j * view.step);
}

/// Whether position n is valid or drifts: any type, non-zero is true; a view that is not given is all true.
inline bool load_flag(const View& view, int64_t n) {
  return !view || load_flag(view.data, view.type, view.at.offset(n));
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
