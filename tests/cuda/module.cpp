// The CUDA operators over NumPy arrays, run by the emulator: the module _cuda_emulated, for the tests of Python.
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/operators.h"
#include "emulator.h"
#include "host/arrays.h"

namespace pruneopd::bindings {
namespace {

void* fill_with_garbage(void* memory, size_t bytes) { return std::memset(memory, 0xa5, bytes); }

struct EmulatedArrays : NumPyArrays {
  explicit EmulatedArrays(int64_t) {}

  template <class T>
  static py::array empty(const Shape& shape) {
    py::array_t<T> array(shape);
    fill_with_garbage(array.mutable_data(), static_cast<size_t>(array.nbytes()));
    return array;
  }

  template <class Args>
  void compute(const Args& args) const {
    std::vector<std::unique_ptr<char[]>> memory;
    cuda::compute(args, {nullptr, 0, [&](int64_t bytes) {
                           memory.emplace_back(new char[static_cast<size_t>(bytes)]);
                           return fill_with_garbage(memory.back().get(), static_cast<size_t>(bytes));
                         }});
  }
};

}  // namespace

PYBIND11_MODULE(_cuda_emulated, m) {
  emulator::settings = {emulator::Order::kShuffled, emulator::Order::kShuffled, 1};
  define_operators<EmulatedArrays>(m, "num_threads");  // which is what pruneopd_kernels.host passes on
}

}  // namespace pruneopd::bindings
