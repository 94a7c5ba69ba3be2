// What the backward passes share on the CPU.
#pragma once

#include <algorithm>
#include <limits>

#include "row_pass.h"
#include "scalars.h"

namespace pruneopd {

/// One position's row of a gradient.
struct GradientRow {
  char* data;
  Scalar type;
  int64_t vocab_size, width;

  GradientRow(void* gradient, const Logits& logits, int64_t width, int64_t n)
      : data(static_cast<char*>(gradient) + n * width * bytes_of(logits.rows.type)),
        type(logits.rows.type),
        vocab_size(logits.vocab_size),
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

/// Calls pass(n) for each position.
template <class Pass>
void for_each_gradient(int64_t positions, const ParallelFor& parallel_for, const Pass& pass) {
  parallel_for(positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    for (int64_t n = begin; n < end; ++n) pass(n);
  });
}

}  // namespace pruneopd
