// What the libraries for CPU tensors and for CUDA tensors share. They use only torch's stable ABI, so that one build
// loads in every torch from 2.11 on. Their namespaces (PRUNEOPD_LIBRARY) and the schemas in them are defined in Python
// (pruneopd_kernels/schemas.py).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "operators/call.h"

namespace pruneopd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) {
  using enum ScalarType;
  constexpr std::pair<ScalarType, const char*> kNames[] = {
      {Bool, "bool"},     {Byte, "uint8"},        {Char, "int8"},     {UInt16, "uint16"}, {Short, "int16"},
      {Int, "int32"},     {UInt32, "uint32"},     {UInt64, "uint64"}, {Long, "int64"},    {Half, "float16"},
      {Float, "float32"}, {BFloat16, "bfloat16"}, {Double, "float64"}};
  for (const auto& [known, name] : kNames)
    if (known == type) return name;
  return torch::headeronly::toString(type);
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

/// An uninitialised tensor on the device of another one. torch::stable::new_empty looks the operator up by its name,
/// which takes longer than the rest of a small call.
inline Tensor new_empty(const Tensor& like, const Shape& shape, std::optional<ScalarType> type) {
  auto dtype = static_cast<int32_t>(type.value_or(ScalarType::Undefined));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()),
                                                   type ? &dtype : nullptr, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

/// A call as torch makes it: a stack of arguments, which this takes over, and where the results go.
class TorchCall : public Call {
 public:
  TorchCall(const char* op, std::string device, StableIValue* stack, uint64_t count)
      : Call(op, std::move(device)), stack_(stack), count_(count) {}

  Array tensor(const char*) override { return describe(next<Tensor>()); }
  MaybeArray optional_tensor(const char*) override {
    std::optional<Tensor> tensor = next<std::optional<Tensor>>();
    if (!tensor) return std::nullopt;
    return describe(*std::move(tensor));
  }
  int64_t integer(const char*) override { return next<int64_t>(); }
  std::optional<int64_t> optional_integer(const char*) override { return next<std::optional<int64_t>>(); }
  double number(const char*) override { return next<double>(); }
  std::optional<double> optional_number(const char*) override { return next<std::optional<double>>(); }
  /// torch's own conversion to std::string leaks up to torch 2.13.
  std::string text(const char*) override {
    const auto handle = next<StringHandle>();
    size_t length = 0;
    const char* characters = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    const std::string text(characters, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }

  /// The schema, in Python, must have as many arguments and results as C++ reads and makes.
  void check_schema(uint64_t results) const {
    if (read_ != count_ || results != outputs_.size()) throw std::logic_error(std::string(op_) + ": another schema");
  }
  void return_outputs() {
    for (size_t n = 0; n < outputs_.size(); ++n) stack_[n] = torch::stable::detail::from(outputs_[n]);
  }

 protected:
  const Tensor& first() const { return inputs_.front(); }
  void* make_output(const Shape& shape, std::optional<Scalar> type) override {
    return outputs_.emplace_back(new_empty(first(), shape, torch_type(type))).mutable_data_ptr();
  }

 private:
  template <class T>
  T next() {
    if (read_ == count_) check_schema(0);
    return torch::stable::detail::to<T>(stack_[read_++]);
  }
  Array describe(Tensor tensor) {
    const auto shape = tensor.sizes(), strides = tensor.strides();
    inputs_.push_back(std::move(tensor));
    const Tensor& kept = inputs_.back();
    return {kept.const_data_ptr(), dtype_name(kept.scalar_type()), device_name(kept), Shape(shape.begin(), shape.end()),
            Shape(strides.begin(), strides.end())};
  }
  static std::optional<ScalarType> torch_type(std::optional<Scalar> type) {
    if (!type) return std::nullopt;
    return *type == Scalar::kBool  ? ScalarType::Bool
           : *type == Scalar::kI32 ? ScalarType::Int
           : *type == Scalar::kI64 ? ScalarType::Long
                                   : ScalarType::Float;
  }

  StableIValue* stack_;
  uint64_t count_, read_ = 0;
  std::vector<Tensor> inputs_, outputs_;
};

/// What torch calls: an operator on the device of OneCall.
template <class OneCall, class Args>
void run(StableIValue* stack, uint64_t arguments, uint64_t results) {
  OneCall call(Args::kName, stack, arguments);
  const Args args = Args::from(call);
  call.check_schema(results);
  call.compute(args);
  call.return_outputs();
}

}  // namespace pruneopd
