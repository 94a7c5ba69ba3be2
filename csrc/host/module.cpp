// The CPU operators over NumPy arrays: the module pruneopd_kernels._host. No torch here, nor behind it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <vector>

#include "bindings/parallel.h"
#include "bindings/reliability.h"
#include "bindings/reliability_from_drift.h"
#include "bindings/reliability_from_topk.h"
#include "bindings/token_stats.h"

namespace pruneopd::bindings {
namespace {

namespace py = pybind11;

/// Where arrays come from and who runs the threads: see Output.
struct NumPy {
  using Tensor = py::array;
  using Text = std::string;

  int64_t num_threads;

  static Array describe(const py::array& array) {
    const py::dtype dtype = array.dtype();
    Array described{array.data(),
                    dtype.attr("name").cast<std::string>(),
                    "cpu",
                    Shape(array.shape(), array.shape() + array.ndim()),
                    {}};
    // NumPy's strides are in bytes, and its elements may lie anywhere and in any byte order.
    const auto itemsize = static_cast<int64_t>(dtype.itemsize());
    if (!array.attr("flags").attr("aligned").cast<bool>() || !dtype.attr("isnative").cast<bool>())
      throw std::invalid_argument("an array must be aligned and in native byte order");
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
      if (array.strides(axis) % itemsize) throw std::invalid_argument("an array's strides must be whole elements");
      described.strides.push_back(array.strides(axis) / itemsize);
    }
    return described;
  }

  template <class T>
  static py::array empty(const Shape& shape) {
    return py::array_t<T>(shape);
  }

  template <class T>
  static T* data(py::array& array) {
    return static_cast<T*>(array.mutable_data());
  }

  template <class Operator>
  void run(const Operator& op) const {
    const py::gil_scoped_release released;
    op([this](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
      share_out(count, grain, num_threads, body, [](int64_t workers, const auto& worker) {
        std::vector<std::jthread> others;
        for (int64_t n = 1; n < workers; ++n) others.emplace_back(worker);
        worker();
      });
    });
  }
};

/// An argument of an operator, as Python names it. Arrays are taken as they are: nothing is converted or copied.
py::arg array(const char* name) { return py::arg(name).noconvert(); }

template <class Result, class... Args, class... Names>
void def(py::module_& m, const char* name, Result (*op)(const NumPy&, Args...), const Names&... names) {
  m.def(
      name, [op](Args... args, int64_t num_threads) { return op(NumPy{num_threads}, args...); }, names...,
      py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The CPU operators of pruneopd_kernels over NumPy arrays; pruneopd_kernels.host checks and calls them.";
  using py::arg;
  const py::kw_only scalars;

  def(m, "reliability", &reliability<NumPy>, array("student_logits"), array("teacher_logits"), array("mask"),
      array("token_ids"), array("cu_seqlens"), array("drift_count"), scalars, arg("k"), arg("threshold"), arg("w_drop"),
      arg("w_base"), arg("eps"), arg("metric"), arg("top_p"), arg("reward_weight"), arg("student_temperature"),
      arg("teacher_temperature"), arg("vocab_size"));
  def(m, "reliability_from_topk", &reliability_from_topk<NumPy>, array("student_topk_ids"), array("teacher_topk_ids"),
      array("mask"), array("teacher_topk_logprobs"), array("token_ids"), array("cu_seqlens"), array("drift_count"),
      scalars, arg("threshold"), arg("w_drop"), arg("w_base"), arg("eps"), arg("metric"), arg("top_p"));
  def(m, "reliability_from_drift", &reliability_from_drift<NumPy>, array("drift"), array("mask"), array("cu_seqlens"),
      array("drift_count"), scalars, arg("w_drop"), arg("w_base"), arg("eps"));
  def(m, "token_stats", &token_stats<NumPy>, array("student_logits"), array("teacher_logits"), array("mask"),
      array("token_ids"), scalars, arg("k"), arg("student_temperature"), arg("teacher_temperature"), arg("vocab_size"));

  m.def("instruction_sets", &instruction_sets, "What this processor runs, best first.");
  m.def("instruction_set", &instruction_set, "What the operators use.");
  m.def("set_instruction_set", &set_instruction_set, arg("name"), "Whether this processor runs it, and so uses it.");
}

}  // namespace pruneopd::bindings
