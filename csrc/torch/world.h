// What the libraries for CPU tensors and for CUDA tensors share. Of torch they use the stable ABI alone, so that one
// build loads in every torch from 2.11 on. Their namespaces (PRUNEOPD_LIBRARY) and the schemas in them are defined in
// Python (pruneopd_kernels/schemas.py).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "bindings/reliability.h"
#include "bindings/reliability_from_drift.h"
#include "bindings/reliability_from_topk.h"
#include "bindings/reverse_kl.h"
#include "bindings/token_stats.h"
#include "bindings/topk_forward_kl.h"
#include "bindings/topk_policy_loss.h"

namespace pruneopd::bindings {

using torch::headeronly::ScalarType;

/// A string argument, in a type of its own: torch's conversion to std::string leaks it up to torch 2.13.
struct Text : std::string {};

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::Short: return "int16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::Int: return "int32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(type);
  }
}

template <class T>
constexpr ScalarType kScalarType = torch::headeronly::CppTypeToScalarType<T>::value;

inline std::string device_name(const torch::stable::Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

/// The part of a world (see Output) that is the same on every device.
struct TorchTensors {
  using Tensor = torch::stable::Tensor;
  using Text = bindings::Text;

  static Array describe(const Tensor& tensor) {
    const auto shape = tensor.sizes(), strides = tensor.strides();
    return {tensor.const_data_ptr(), dtype_name(tensor.scalar_type()), device_name(tensor),
            Shape(shape.begin(), shape.end()), Shape(strides.begin(), strides.end())};
  }

  static Tensor empty_like(const Tensor& tensor) {
    const auto shape = tensor.sizes();
    return torch::stable::new_empty(tensor, shape);
  }

  template <class T>
  static T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
};

/// An operator as TORCH_BOX takes it: a function of the schema's arguments alone. Its world is made from the first.
template <class World, auto kOperator>
struct Boxed;
template <class World, class Result, class... Args,
          Result (*kOperator)(const World&, const torch::stable::Tensor&, Args...)>
struct Boxed<World, kOperator> {
  static Result call(const torch::stable::Tensor& first, Args... args) {
    return kOperator(World(first), first, args...);
  }
};

/// The losses and their backward passes in one world.
template <class World>
void implement_losses(torch::stable::detail::StableLibrary& library) {
  library.impl("topk_policy_loss", TORCH_BOX((&Boxed<World, &topk_policy_loss<World>>::call)));
  library.impl("topk_forward_kl", TORCH_BOX((&Boxed<World, &topk_forward_kl<World>>::call)));
  library.impl("reverse_kl", TORCH_BOX((&Boxed<World, &reverse_kl<World>>::call)));
  library.impl("logprobs_backward", TORCH_BOX((&Boxed<World, &logprobs_backward<World>>::call)));
  library.impl("reverse_kl_backward", TORCH_BOX((&Boxed<World, &reverse_kl_backward<World>>::call)));
}

/// The operators without a gradient in one world.
template <class World>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("reliability", TORCH_BOX((&Boxed<World, &reliability<World>>::call)));
  library.impl("reliability_from_topk", TORCH_BOX((&Boxed<World, &reliability_from_topk<World>>::call)));
  library.impl("reliability_from_drift", TORCH_BOX((&Boxed<World, &reliability_from_drift<World>>::call)));
  library.impl("token_stats", TORCH_BOX((&Boxed<World, &token_stats<World>>::call)));
}

}  // namespace pruneopd::bindings

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<pruneopd::bindings::Text> {
  static pruneopd::bindings::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* characters = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    pruneopd::bindings::Text text{std::string(characters, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
