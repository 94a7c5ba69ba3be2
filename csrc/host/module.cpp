// The CPU operators over NumPy arrays: the module pruneopd_kernels._host, which does not know torch.
#include <thread>

#include "cpu/instruction_sets.h"
#include "cpu/share_out.h"
#include "host/numpy_call.h"

namespace pruneopd {

PYBIND11_MODULE(_host, m) {
  m.doc() = "The CPU operators of pruneopd_kernels over NumPy arrays; pruneopd_kernels.host checks and calls them.";
  define_operators<NumPyCall>(m, [](const auto& args, int64_t num_threads) {
    const py::gil_scoped_release released;
    compute(args, [&](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
      share_out(count, grain, num_threads, body, [](int64_t workers, const auto& worker) {
        std::vector<std::jthread> others;
        for (int64_t n = 1; n < workers; ++n) others.emplace_back(worker);
        worker();
      });
    });
  });

  m.def("instruction_sets", &instruction_sets, "The instruction sets that this processor runs, best first.");
  m.def("instruction_set", &instruction_set, "The instruction set in use.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"),
        "Use an instruction set; return whether this processor runs it.");
}

}  // namespace pruneopd
