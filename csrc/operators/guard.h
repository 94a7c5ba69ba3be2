// The guards: they turn a caller's tensors into views and keep the operators inside their memory. The checks that users
// meet are in Python (pruneopd_kernels/checks.py), in the same words.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "views.h"

namespace pruneopd {

using Shape = std::vector<int64_t>;

int64_t count(const Shape& shape);
Shape without_last(Shape shape);
Shape with_last(Shape shape, int64_t last);

/// A tensor of torch or an array of NumPy.
struct Array {
  const void* data = nullptr;
  std::string dtype;  // by the name that torch and NumPy share: "float32"
  std::string device = "cpu";
  Shape shape;
  Shape strides;  // in elements
};

using MaybeArray = std::optional<Array>;

/// The dtypes that an argument may have, and how an error names them.
struct Dtypes {
  const char* words;
  std::vector<std::string_view> names;
};

extern const Dtypes kLogits, kIds, kMask, kLogprobs, kGradient, kState, kBool, kInt32;

/// The guards of one operator: each returns a part of what the operator takes, or throws std::runtime_error with
/// `<op>: <argument> must <rule>, got <actual>`.
class Guard {
 public:
  /// Every tensor must be on `device`.
  Guard(const char* op, std::string device) : op_(op), device_(std::move(device)) {}

  /// Any leading axes; `along_responses` asks for [B, T, V] or [N, V].
  std::pair<Logits, Logits> logits_pair(const Array& student, const Array& teacher, double student_temperature,
                                        double teacher_temperature, std::optional<int64_t> vocab_size,
                                        bool along_responses = false) const;
  /// Those of one model, the argument `logits`, with any leading axes.
  Logits one_logits(const Array& logits, double temperature, std::optional<int64_t> vocab_size) const;
  void check_k(int64_t k, int64_t vocab_size, int64_t least = 1) const;

  /// One value per position. An argument that was not given becomes an empty View.
  View values(const char* argument, const MaybeArray& array, const Shape& positions, const Dtypes& dtypes) const;
  /// One row of values per position, along the last axis of `shape`.
  View rows(const char* argument, const MaybeArray& array, const Shape& shape, const Dtypes& dtypes) const;
  /// Up to `most` ids per position: [..., letter].
  View ids(const char* argument, const Array& array, const Shape& positions, int64_t most, const char* letter) const;
  /// The candidates of [B, T, k] or [N, k].
  View topk_ids(const char* argument, const Array& array) const;
  /// The flags of [B, T] or [N].
  View drift(const Array& array) const;

  /// The responses in positions of shape [B, T], or [N] with cu_seqlens [B + 1]. `packed` and `padded` describe the
  /// two layouts in an error.
  Responses responses(const Shape& positions, const MaybeArray& cu_seqlens, const char* packed,
                      const char* padded) const;
  Metric metric(std::string_view name) const;
  void check_given_for_top_p(const DriftRule& rule, const char* argument, const MaybeArray& array) const;
  RewardWeight reward_weight(std::string_view name) const;

 protected:
  [[noreturn]] void fail(const std::string& argument, const std::string& rule, const std::string& actual) const;

  const char* op_;
  std::string device_;

 private:
  View view(const char* argument, const Array& array, const Shape& shape, const Dtypes& dtypes, size_t axes) const;
  Logits logits(const char* argument, const Array& array, double temperature) const;
};

}  // namespace pruneopd
