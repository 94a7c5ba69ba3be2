// The CUDA operators over NumPy arrays, run by the emulator: the module _cuda_emulated, for the tests of Python.
#include <cstring>
#include <memory>
#include <vector>

#include "bindings/reverse_kl.h"
#include "bindings/topk_forward_kl.h"
#include "bindings/topk_policy_loss.h"
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

  static py::array empty_like(const py::array& array) {
    py::array like = NumPyArrays::empty_like(array);
    fill_with_garbage(like.mutable_data(), static_cast<size_t>(like.nbytes()));
    return like;
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

/// The losses and their backward passes, by the names of pruneopd_kernels/schemas.py.
void define_losses(py::module_& m, const char* setting) {
  using World = EmulatedArrays;
  using py::arg;
  const py::kw_only scalars;
  def<World>(m, setting, "topk_policy_loss", &topk_policy_loss<World>, array("student_logits"), array("topk_ids"),
             array("advantages"), array("mask"), array("old_logprobs"), scalars, arg("clip_low"), arg("clip_high"),
             arg("clip_dual"), arg("student_temperature"), arg("vocab_size"));
  def<World>(m, setting, "topk_forward_kl", &topk_forward_kl<World>, array("student_logits"),
             array("teacher_topk_ids"), array("teacher_topk_logprobs"), array("mask"), scalars, arg("logprob_min"),
             arg("student_temperature"), arg("vocab_size"));
  def<World>(m, setting, "reverse_kl", &reverse_kl<World>, array("student_logits"), array("teacher_logits"),
             array("mask"), array("weight"), scalars, arg("student_temperature"), arg("teacher_temperature"),
             arg("vocab_size"));
  def<World>(m, setting, "logprobs_backward", &logprobs_backward<World>, array("student_logits"), array("topk_ids"),
             array("coefficients"), array("state"), array("scale"), scalars, arg("student_temperature"),
             arg("vocab_size"));
  def<World>(m, setting, "reverse_kl_backward", &reverse_kl_backward<World>, array("student_logits"),
             array("teacher_logits"), array("state"), array("scale"), scalars, arg("student_temperature"),
             arg("teacher_temperature"), arg("vocab_size"));
}

}  // namespace

PYBIND11_MODULE(_cuda_emulated, m) {
  emulator::settings = {emulator::Order::kShuffled, emulator::Order::kShuffled, 1};
  define_operators<EmulatedArrays>(m, "num_threads");  // which is what pruneopd_kernels.host passes on
  define_losses(m, "num_threads");
  m.def("set_emulator", [](int multiprocessors, uint64_t seed) {
    emulator::settings = {emulator::Order::kShuffled, emulator::Order::kShuffled, seed, multiprocessors};
  });
}

}  // namespace pruneopd::bindings
