// The guards: they turn a caller's tensors into views and keep the operators inside their memory. The checks that users
// meet are in Python (pruneopd_kernels/checks.py), in the same words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "views.h"

namespace pruneopd {

using Shape = std::vector<int64_t>;

inline int64_t count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}
inline Shape without_last(Shape shape) {
  shape.pop_back();
  return shape;
}
inline Shape with_last(Shape shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

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

inline const Dtypes kLogits{"float32, bfloat16 or float16", {"float32", "bfloat16", "float16"}};
inline const Dtypes kLogprobs{"float32, bfloat16, float16 or float64", {"float32", "bfloat16", "float16", "float64"}};
inline const Dtypes kGradient{"float32 or float64", {"float32", "float64"}};
inline const Dtypes kState{"float64", {"float64"}};
inline const Dtypes kIds{"int32 or int64", {"int32", "int64"}};
inline const Dtypes kBool{"bool", {"bool"}};
inline const Dtypes kInt32{"int32", {"int32"}};
inline const Dtypes kMask{"bool, integer or float",
                          {"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
                           "bfloat16", "float32", "float64"}};

/// The guards of one operator: each returns a part of what the operator takes, or throws std::runtime_error with
/// `<op>: <argument> must <rule>, got <actual>`.
class Guard {
 public:
  /// Every tensor must be on `device`.
  Guard(const char* op, std::string device) : op_(op), device_(std::move(device)) {}

  /// Any leading axes; `along_responses` asks for [B, T, V] or [N, V].
  std::pair<Logits, Logits> logits_pair(const Array& student, const Array& teacher, double student_temperature,
                                        double teacher_temperature, std::optional<int64_t> vocab_size,
                                        bool along_responses = false) const {
    const size_t axes = student.shape.size();
    if (along_responses && axes != 2 && axes != 3)
      fail("student_logits", "have shape [B, T, V] or [N, V]", shape_text(student.shape));
    Logits of_student = logits("student_logits", student, student_temperature);
    const Shape positions = without_last(student.shape);
    if (teacher.shape.size() != axes || without_last(teacher.shape) != positions)
      fail("teacher_logits", "have shape " + shape_text(positions, "V"), shape_text(teacher.shape));
    Logits of_teacher = logits("teacher_logits", teacher, teacher_temperature);

    if (!vocab_size && of_student.vocab_size != of_teacher.vocab_size)
      fail("vocab_size", "be given when the last axes of student_logits and teacher_logits differ",
           std::to_string(of_student.vocab_size) + " and " + std::to_string(of_teacher.vocab_size));
    const int64_t width = std::min(of_student.vocab_size, of_teacher.vocab_size);
    of_student.vocab_size = of_teacher.vocab_size = vocab_size.value_or(width);
    if (of_student.vocab_size < 1 || of_student.vocab_size > width)
      fail("vocab_size", "be between 1 and min(student, teacher) width = " + std::to_string(width),
           std::to_string(of_student.vocab_size));
    return {of_student, of_teacher};
  }
  /// Those of one model, the argument `logits`, with any leading axes.
  Logits one_logits(const Array& array, double temperature, std::optional<int64_t> vocab_size) const {
    Logits one = logits("logits", array, temperature);
    const int64_t width = one.vocab_size;
    one.vocab_size = vocab_size.value_or(width);
    if (one.vocab_size < 1 || one.vocab_size > width)
      fail("vocab_size", "be between 1 and the logits' width = " + std::to_string(width),
           std::to_string(one.vocab_size));
    return one;
  }
  void check_k(int64_t k, int64_t vocab_size, int64_t least = 1) const {
    const int64_t most = std::min(vocab_size, kMaxCandidates);
    if (k < least || k > most)
      fail("k", "be between " + std::to_string(least) + " and min(vocab_size, 256) = " + std::to_string(most),
           std::to_string(k));
  }

  /// One value per position. An argument that was not given becomes an empty View.
  View values(const char* argument, const MaybeArray& array, const Shape& positions, const Dtypes& dtypes) const {
    return array ? view(argument, *array, positions, dtypes, positions.size()) : View{};
  }
  /// One row of values per position, along the last axis of `shape`.
  View rows(const char* argument, const MaybeArray& array, const Shape& shape, const Dtypes& dtypes) const {
    return array ? view(argument, *array, shape, dtypes, shape.size() - 1) : View{};
  }
  /// Up to `most` ids per position: [..., letter].
  View ids(const char* argument, const Array& array, const Shape& positions, int64_t most, const char* letter) const {
    const Shape& shape = array.shape;
    if (shape.size() != positions.size() + 1 || without_last(shape) != positions || shape.back() < 1 ||
        shape.back() > most)
      fail(argument,
           "have shape " + shape_text(positions, letter) + " with 1 <= " + letter + " <= " + std::to_string(most),
           shape_text(shape));
    return view(argument, array, shape, kIds, shape.size() - 1);
  }
  /// The candidates of [B, T, k] or [N, k].
  View topk_ids(const char* argument, const Array& array) const {
    const size_t axes = array.shape.size();
    if ((axes != 2 && axes != 3) || array.shape.back() < 1 || array.shape.back() > kMaxCandidates)
      fail(argument, "have shape [B, T, k] or [N, k] with 1 <= k <= 256", shape_text(array.shape));
    return view(argument, array, array.shape, kIds, axes - 1);
  }
  /// The flags of [B, T] or [N].
  View drift(const Array& array) const {
    const size_t axes = array.shape.size();
    if (axes != 1 && axes != 2) fail("drift", "have shape [B, T] or [N]", shape_text(array.shape));
    return view("drift", array, array.shape, kBool, axes);
  }

  /// The responses in positions of shape [B, T], or [N] with cu_seqlens [B + 1]. `packed` and `padded` describe the
  /// two layouts in an error.
  Responses responses(const Shape& positions, const MaybeArray& cu_seqlens, const char* packed,
                      const char* padded) const {
    if (positions.size() == 2) {
      if (cu_seqlens)
        fail("cu_seqlens", std::string("be None when ") + padded, "shape " + shape_text(cu_seqlens->shape));
      return {positions[0], count(positions), View{}};
    }
    if (!cu_seqlens) fail("cu_seqlens", std::string("be given when ") + packed, "None");
    const Shape& shape = cu_seqlens->shape;
    if (shape.size() != 1 || shape[0] == 0) fail("cu_seqlens", "have shape [B + 1]", shape_text(shape));
    return {shape[0] - 1, positions[0], view("cu_seqlens", *cu_seqlens, shape, kIds, 1)};
  }
  Metric metric(std::string_view name) const {
    if (name == "overlap") return Metric::kOverlap;
    if (name == "top_p") return Metric::kTopP;
    fail("metric", "be one of 'overlap', 'top_p'", quoted(name));
  }
  void check_given_for_top_p(const DriftRule& rule, const char* argument, const MaybeArray& array) const {
    if (rule.metric == Metric::kTopP && !array) fail(argument, "be given when metric is 'top_p'", "None");
  }
  RewardWeight reward_weight(std::string_view name) const {
    if (name == "student") return RewardWeight::kStudent;
    if (name == "teacher") return RewardWeight::kTeacher;
    if (name == "none") return RewardWeight::kNone;
    fail("reward_weight", "be one of 'student', 'teacher', 'none'", quoted(name));
  }

 protected:
  [[noreturn]] void fail(const std::string& argument, const std::string& rule, const std::string& actual) const {
    throw std::runtime_error(std::string(op_) + ": " + argument + " must " + rule + ", got " + actual);
  }

  const char* op_;
  std::string device_;

 private:
  /// "[2, 3]", or "[2, 3, V]" with the name of one more axis.
  static std::string shape_text(const Shape& shape, const char* last = "") {
    std::string words;
    for (const int64_t size : shape) words.append(words.empty() ? "" : ", ").append(std::to_string(size));
    if (*last) words.append(words.empty() ? "" : ", ").append(last);
    return "[" + words + "]";
  }

  static std::string quoted(std::string_view name) { return std::string("'").append(name).append("'"); }

  static Scalar scalar(const std::string& dtype) {
    // Only masks have unsigned types. They are compared with zero, for which the signed type of the same width will do.
    static const std::map<std::string_view, Scalar> kScalars{
        {"bool", Scalar::kBool},  {"uint8", Scalar::kU8},    {"int8", Scalar::kI8},       {"uint16", Scalar::kI16},
        {"int16", Scalar::kI16},  {"uint32", Scalar::kI32},  {"int32", Scalar::kI32},     {"uint64", Scalar::kI64},
        {"int64", Scalar::kI64},  {"float16", Scalar::kF16}, {"bfloat16", Scalar::kBF16}, {"float32", Scalar::kF32},
        {"float64", Scalar::kF64}};
    return kScalars.at(dtype);
  }
  /// A view whose first `axes` axes are the positions.
  View view(const char* argument, const Array& array, const Shape& shape, const Dtypes& dtypes, size_t axes) const {
    if (array.shape != shape) fail(argument, "have shape " + shape_text(shape), shape_text(array.shape));
    if (std::find(dtypes.names.begin(), dtypes.names.end(), array.dtype) == dtypes.names.end())
      fail(argument, std::string("have dtype ") + dtypes.words, array.dtype);
    if (array.device != device_) fail(argument, "be on " + device_, array.device);
    return {array.data, scalar(array.dtype),
            Positions(array.shape.data(), array.strides.data(), static_cast<int64_t>(axes)),
            axes < shape.size() ? array.strides.back() : 1};
  }
  /// Rows of logits, not yet limited to a vocabulary.
  Logits logits(const char* argument, const Array& array, double temperature) const {
    if (array.shape.empty()) fail(argument, "have shape [..., V]", shape_text(array.shape));
    View rows = view(argument, array, array.shape, kLogits, array.shape.size() - 1);
    if (array.shape.back() > 1 && rows.step != 1 && count(array.shape) > 0)  // an empty tensor has any strides
      fail(argument, "have stride 1 on its last axis", std::to_string(rows.step));
    rows.step = 1;
    return {rows, temperature, array.shape.back()};
  }
};

}  // namespace pruneopd
