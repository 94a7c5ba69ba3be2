// The operators for CPU tensors: the library pruneopd_kernels/_cpp.so.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "cpu/instruction_sets.h"
#include "cpu/share_out.h"
#include "operators/list.h"
#include "operators/row_max.h"
#include "torch/torch_call.h"

namespace pruneopd {
namespace {

/// Asks for huge pages for an output that is about to be written for the first time: small pages would take longer than
/// all the rest of a gradient. NumPy does the same for its arrays.
void ask_for_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

class CpuCall : public TorchCall {
 public:
  CpuCall(const char* op, StableIValue* stack, uint64_t count) : TorchCall(op, "cpu", stack, count) {}

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

 protected:
  void* make_output(const Shape& shape, std::optional<Scalar> type) override {
    void* const data = TorchCall::make_output(shape, type);
    if (!type) ask_for_huge_pages(data, static_cast<size_t>(count(shape)) * first().element_size());
    return data;
  }
};

STABLE_TORCH_LIBRARY_IMPL(PRUNEOPD_LIBRARY, CPU, m) {
  for_each_operator([&]<class Args>() { m.impl(Args::kName, &run<CpuCall, Args>); });
  m.impl(RowMaxArgs::kName, &run<CpuCall, RowMaxArgs>);
}

}  // namespace
}  // namespace pruneopd

// Which instruction set the operators use, for ctypes (pruneopd_kernels/dispatch/cpp.py). The strings live as long as
// the library.
#define PRUNEOPD_EXPORT extern "C" __attribute__((visibility("default")))

PRUNEOPD_EXPORT const char* pruneopd_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const std::string& name : pruneopd::instruction_sets()) joined += (joined.empty() ? "" : ",") + name;
    return joined;
  }();
  return names.c_str();
}

PRUNEOPD_EXPORT const char* pruneopd_instruction_set() { return pruneopd::instruction_set(); }

PRUNEOPD_EXPORT int pruneopd_set_instruction_set(const char* name) { return pruneopd::set_instruction_set(name); }
