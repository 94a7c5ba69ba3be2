// The CPU operators over NumPy arrays: the module pruneopd_kernels._host. No torch here, nor behind it.
#include <thread>
#include <vector>

#include "bindings/parallel.h"
#include "cpu/operators.h"
#include "host/arrays.h"

namespace pruneopd::bindings {
namespace {

struct CpuArrays : NumPyArrays {
  int64_t num_threads;

  explicit CpuArrays(int64_t num_threads) : num_threads(num_threads) {}

  template <class Args>
  void compute(const Args& args) const {
    const py::gil_scoped_release released;
    pruneopd::compute(args, [this](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
      share_out(count, grain, num_threads, body, [](int64_t workers, const auto& worker) {
        std::vector<std::jthread> others;
        for (int64_t n = 1; n < workers; ++n) others.emplace_back(worker);
        worker();
      });
    });
  }
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The CPU operators of pruneopd_kernels over NumPy arrays; pruneopd_kernels.host checks and calls them.";
  define_operators<CpuArrays>(m, "num_threads");

  m.def("instruction_sets", &instruction_sets, "What this processor runs, best first.");
  m.def("instruction_set", &instruction_set, "What the operators use.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"),
        "Whether this processor runs it, and so uses it.");
}

}  // namespace pruneopd::bindings
