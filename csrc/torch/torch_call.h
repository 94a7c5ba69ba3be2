// What the libraries for CPU tensors and for CUDA tensors share. They use only torch's stable ABI, so that one build
// loads in every torch from 2.11 on. Their namespaces (PRUNEOPD_LIBRARY) and the schemas in them are defined in Python
// (pruneopd_kernels/ops).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
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

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
/// A tensor that is owned here, until it is released to torch.
using Owned = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

/// A contiguous tensor that is not initialised, on the device of another one. torch::stable::empty looks the operator
/// up by its name, which takes 1.3 us for each output; this takes 0.2 us.
inline Owned empty_on_device_of(const Tensor& other, const Shape& shape, ScalarType type) {
  Shape strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * std::max<int64_t>(shape[axis], 1);
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device, other.get_device_index(), &made));
  return Owned(made);
}

inline void* data_of(const Owned& tensor) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  return data;
}

/// A call as torch makes it: a stack of arguments, which this takes over, and where the results go.
class TorchCall : public Call {
 public:
  TorchCall(const char* op, std::string device, StableIValue* stack, uint64_t count)
      : Call(op, std::move(device)), stack_(stack), count_(count) {
    inputs_.reserve(8);
    outputs_.reserve(16);
  }

  Array tensor(const char*) override { return describe(next<Tensor>()); }
  MaybeArray optional_tensor(const char*) override {
    std::optional<Tensor> tensor = next<std::optional<Tensor>>();
    if (!tensor) return std::nullopt;
    return describe(*std::move(tensor));
  }
  int64_t integer(const char*) override { return next<int64_t>(); }
  std::optional<int64_t> optional_integer(const char*) override { return next<std::optional<int64_t>>(); }
  double number(const char*) override { return next<double>(); }
  bool boolean(const char*) override { return next<bool>(); }
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
    for (size_t n = 0; n < outputs_.size(); ++n) stack_[n] = torch::stable::detail::from(outputs_[n].release());
  }

 protected:
  const Tensor& first() const { return inputs_.front(); }
  void* make_output(const Shape& shape, std::optional<Scalar> type) override {
    return data_of(outputs_.emplace_back(empty_on_device_of(first(), shape, torch_type(type))));
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
  ScalarType torch_type(std::optional<Scalar> type) const {
    using enum ScalarType;
    constexpr ScalarType kTypes[] = {Bool, Byte, Char, Short, Int, Long, Half, BFloat16, Float, Double};  // of Scalar
    return type ? kTypes[static_cast<size_t>(*type)] : first().scalar_type();
  }

  StableIValue* stack_;
  uint64_t count_, read_ = 0;
  std::vector<Tensor> inputs_;
  std::vector<Owned> outputs_;
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
