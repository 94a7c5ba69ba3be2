// Chooses the instruction set: the best that this processor runs, or the one that was asked for.
#include <atomic>

#include "instruction_sets.h"
#include "row_pass.h"

namespace pruneopd {

#ifdef PRUNEOPD_HAVE_X86
namespace avx512 {
extern const RowKernels kRowKernels;
}
namespace avx2 {
extern const RowKernels kRowKernels;
}
#endif
namespace portable {
extern const RowKernels kRowKernels;
}

namespace {

/// Best first.
std::vector<const RowKernels*> usable_kernels() {
  std::vector<const RowKernels*> usable;
#ifdef PRUNEOPD_HAVE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    usable.push_back(&avx512::kRowKernels);
  if (avx2) usable.push_back(&avx2::kRowKernels);
#endif
  usable.push_back(&portable::kRowKernels);
  return usable;
}

std::atomic<const RowKernels*>& in_use() {
  static std::atomic<const RowKernels*> kernels = usable_kernels().front();
  return kernels;
}

}  // namespace

const RowKernels& row_kernels() { return *in_use().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const RowKernels* kernels : usable_kernels()) names.emplace_back(kernels->instruction_set);
  return names;
}

const char* instruction_set() { return row_kernels().instruction_set; }

bool set_instruction_set(const std::string& name) {
  for (const RowKernels* kernels : usable_kernels()) {
    if (name != kernels->instruction_set) continue;
    in_use().store(kernels, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace pruneopd
