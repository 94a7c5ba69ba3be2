// The operators for CPU tensors: the library pruneopd_kernels/_cpp.so.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <vector>

#include "bindings/parallel.h"
#include "bindings/row_max.h"
#include "cpu/operators.h"
#include "torch/world.h"

namespace pruneopd::bindings {
namespace {

/// Asks for huge pages where a tensor as large as logits is about to be written for the first time: page by page, that
/// takes longer than all else that is done to it. NumPy asks for its arrays, too. Where there are none, nothing
/// changes.
void ask_for_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct CpuTensors : TorchTensors {
  explicit CpuTensors(const Tensor&) {}

  static std::string device() { return "cpu"; }

  template <class T>
  static Tensor empty(const Shape& shape) {
    return torch::stable::empty(shape, kScalarType<T>);
  }

  static Tensor empty_like(const Tensor& tensor) {
    Tensor empty = TorchTensors::empty_like(tensor);
    ask_for_huge_pages(data<void>(empty), empty.numel() * static_cast<int64_t>(empty.element_size()));
    return empty;
  }

  template <class Args>
  static void compute(const Args& args) {
    pruneopd::compute(args, [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
      share_out(count, grain, torch::stable::get_num_threads(), body, [](int64_t workers, const auto& worker) {
        torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
          for (; begin < end; ++begin) worker();
        });
      });
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(PRUNEOPD_LIBRARY, CPU, m) {
  implement<CpuTensors>(m);
  implement_losses<CpuTensors>(m);
  m.impl("row_max", TORCH_BOX((&Boxed<CpuTensors, &row_max<CpuTensors>>::call)));
}

}  // namespace
}  // namespace pruneopd::bindings

// Which instruction set the operators use, for ctypes (pruneopd_kernels/dispatch/cpp.py). The strings live as long as the
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
