// One position's row of a gradient.
#pragma once

#include <algorithm>
#include <limits>

#include "scalars.h"

namespace pruneopd {

struct GradientRow {
  char* data;
  Scalar type;
  int64_t vocab_size, width;

  GradientRow(void* gradient, Scalar type, int64_t vocab_size, int64_t width, int64_t n)
      : data(static_cast<char*>(gradient) + n * width * bytes_of(type)),
        type(type),
        vocab_size(vocab_size),
        width(width) {}

  void store(int64_t id, double value) const {
    with_logits(data, type,
                [&]<class T>(const T*) { reinterpret_cast<T*>(data)[id] = from_float<T>(static_cast<float>(value)); });
  }
  /// Ids that do not exist have no gradient.
  void clear_from(int64_t id) const { std::fill(data + id * bytes_of(type), data + width * bytes_of(type), char{0}); }
  void spoil() const {
    for (int64_t id = 0; id < vocab_size; ++id) store(id, std::numeric_limits<double>::quiet_NaN());
    clear_from(vocab_size);
  }
};

}  // namespace pruneopd
