// The CPU operators for torch, through its stable ABI alone, so that one build loads in every torch from 2.11 on.
// The schemas of the namespace pruneopd_cpp are defined in Python (pruneopd_kernels/schemas.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "bindings/parallel.h"
#include "bindings/reliability.h"
#include "bindings/reliability_from_drift.h"
#include "bindings/reliability_from_topk.h"
#include "bindings/token_stats.h"

namespace pruneopd::bindings {
namespace {

using torch::headeronly::ScalarType;

/// A string argument, in a type of its own: torch's conversion to std::string leaks it up to torch 2.13.
struct Text : std::string {};

std::string dtype_name(ScalarType type) {
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

/// Where tensors come from and who runs the threads: see Output.
struct Torch {
  using Tensor = torch::stable::Tensor;
  using Text = bindings::Text;

  static Array describe(const Tensor& tensor) {
    const auto shape = tensor.sizes(), strides = tensor.strides();
    return {tensor.const_data_ptr(), dtype_name(tensor.scalar_type()), tensor.is_cpu() ? "cpu" : "another device",
            Shape(shape.begin(), shape.end()), Shape(strides.begin(), strides.end())};
  }

  template <class T>
  static Tensor empty(const Shape& shape) {
    return torch::stable::empty(shape, kScalarType<T>);
  }

  template <class T>
  static T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  template <class Operator>
  static void run(const Operator& op) {
    op([](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
      share_out(count, grain, torch::stable::get_num_threads(), body, [](int64_t workers, const auto& worker) {
        torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
          for (; begin < end; ++begin) worker();
        });
      });
    });
  }
};

/// An operator as TORCH_BOX takes it: a function of the schema's arguments alone.
template <auto kOperator>
struct Unbound;
template <class Result, class... Args, Result (*kOperator)(const Torch&, Args...)>
struct Unbound<kOperator> {
  static Result call(Args... args) { return kOperator(Torch{}, args...); }
};

}  // namespace
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

namespace pruneopd::bindings {

STABLE_TORCH_LIBRARY_IMPL(pruneopd_cpp, CPU, m) {
  m.impl("reliability", TORCH_BOX(&Unbound<&reliability<Torch>>::call));
  m.impl("reliability_from_topk", TORCH_BOX(&Unbound<&reliability_from_topk<Torch>>::call));
  m.impl("reliability_from_drift", TORCH_BOX(&Unbound<&reliability_from_drift<Torch>>::call));
  m.impl("token_stats", TORCH_BOX(&Unbound<&token_stats<Torch>>::call));
  m.impl("row_max", TORCH_BOX(&Unbound<&row_max<Torch>>::call));
}

}  // namespace pruneopd::bindings

// Which instruction set the operators use, for ctypes (pruneopd_kernels/ops/_cpp.py). The strings live as long as the
// library.
#define PRUNEOPD_EXPORT extern "C" __attribute__((visibility("default")))

PRUNEOPD_EXPORT const char* pruneopd_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const std::string& name : pruneopd::instruction_sets()) joined += (joined.empty() ? "" : ",") + name;
    return joined;
  }();
  return names.c_str();
}

PRUNEOPD_EXPORT const char* pruneopd_instruction_set() {
  static const std::vector<std::string> names = pruneopd::instruction_sets();
  for (const std::string& name : names)
    if (name == pruneopd::instruction_set()) return name.c_str();
  return "";
}

PRUNEOPD_EXPORT int pruneopd_set_instruction_set(const char* name) { return pruneopd::set_instruction_set(name); }
