// One call of an operator. Each operator's header in this folder says with it what the operator takes and returns.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "operators/guard.h"

namespace pruneopd {

template <class T>
constexpr Scalar kScalarOf = Scalar::kF32;
template <>
constexpr Scalar kScalarOf<bool> = Scalar::kBool;
template <>
constexpr Scalar kScalarOf<int32_t> = Scalar::kI32;
template <>
constexpr Scalar kScalarOf<int64_t> = Scalar::kI64;
template <>
constexpr Scalar kScalarOf<double> = Scalar::kF64;

/// Hands out the arguments and makes the outputs, for torch (csrc/torch) or NumPy (csrc/host). Torch passes arguments
/// without names. So an operator reads them in the order of its schema (pruneopd_kernels/ops), all of them
/// before its guards, and makes its outputs in the order of the schema.
class Call : public Guard {
 public:
  using Guard::Guard;
  virtual ~Call() = default;

  virtual Array tensor(const char* name) = 0;
  virtual MaybeArray optional_tensor(const char* name) = 0;
  virtual int64_t integer(const char* name) = 0;
  virtual std::optional<int64_t> optional_integer(const char* name) = 0;
  virtual double number(const char* name) = 0;
  virtual bool boolean(const char* name) = 0;
  virtual std::string text(const char* name) = 0;

  /// The arguments w_drop, w_base and eps.
  ScanRule read_scan_rule() {
    ScanRule rule;
    for (auto [name, value] : {std::pair{"w_drop", &rule.w_drop}, {"w_base", &rule.w_base}, {"eps", &rule.eps}})
      *value = number(name);
    return rule;
  }
  /// The arguments student_temperature, teacher_temperature and vocab_size, which no text follows in a schema; then the
  /// guards.
  std::pair<Logits, Logits> read_logits_pair(const Array& student, const Array& teacher, bool along_responses = false) {
    const double student_temperature = number("student_temperature");
    const double teacher_temperature = number("teacher_temperature");
    return logits_pair(student, teacher, student_temperature, teacher_temperature, optional_integer("vocab_size"),
                       along_responses);
  }
  /// The same for one model: temperature and vocab_size.
  Logits read_logits(const Array& logits) {
    const double temperature = number("temperature");
    return one_logits(logits, temperature, optional_integer("vocab_size"));
  }

  /// An output: contiguous and not initialised.
  template <class T>
  T* output(const Shape& shape) {
    return static_cast<T*>(make_output(shape, kScalarOf<T>));
  }
  /// An output of the shape and dtype of the call's first tensor.
  void* output_like_first(const Array& first) { return make_output(first.shape, std::nullopt); }
  /// The outputs of the scan along each response.
  ScanOutputs scan_outputs(const Shape& positions, int64_t responses) {
    return {output<int32_t>(positions), output<float>(positions), output<float>(positions),
            output<int32_t>({responses})};
  }

 protected:
  /// None as the type: that of the first tensor.
  virtual void* make_output(const Shape& shape, std::optional<Scalar> type) = 0;
};

}  // namespace pruneopd
