// Operators over NumPy arrays: what a pybind11 module of them needs but for where they run.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings/reliability.h"
#include "bindings/reliability_from_drift.h"
#include "bindings/reliability_from_topk.h"
#include "bindings/token_stats.h"

namespace pruneopd::bindings {

namespace py = pybind11;

/// The part of a world (see Output) that is the same wherever operators run.
struct NumPyArrays {
  using Tensor = py::array;
  using Text = std::string;

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

  static std::string device() { return "cpu"; }

  template <class T>
  static py::array empty(const Shape& shape) {
    return py::array_t<T>(shape);
  }

  static py::array empty_like(const py::array& array) {
    return py::array(array.dtype(), Shape(array.shape(), array.shape() + array.ndim()));
  }

  template <class T>
  static T* data(py::array& array) {
    return static_cast<T*>(array.mutable_data());
  }
};

/// An argument of an operator, as Python names it. Arrays are taken as they are: nothing is converted or copied.
inline py::arg array(const char* name) { return py::arg(name).noconvert(); }

template <class World, class Result, class... Args, class... Names>
void def(py::module_& m, const char* setting, const char* name, Result (*op)(const World&, Args...),
         const Names&... names) {
  m.def(name, [op](Args... args, int64_t value) { return op(World{value}, args...); }, names..., py::arg(setting));
}

/// The four operators, in a world that each call makes from a last argument called `setting`.
template <class World>
void define_operators(py::module_& m, const char* setting) {
  using py::arg;
  const py::kw_only scalars;
  def<World>(m, setting, "reliability", &reliability<World>, array("student_logits"), array("teacher_logits"),
             array("mask"), array("token_ids"), array("cu_seqlens"), array("drift_count"), scalars, arg("k"),
             arg("threshold"), arg("w_drop"), arg("w_base"), arg("eps"), arg("metric"), arg("top_p"),
             arg("reward_weight"), arg("student_temperature"), arg("teacher_temperature"), arg("vocab_size"));
  def<World>(m, setting, "reliability_from_topk", &reliability_from_topk<World>, array("student_topk_ids"),
             array("teacher_topk_ids"), array("mask"), array("teacher_topk_logprobs"), array("token_ids"),
             array("cu_seqlens"), array("drift_count"), scalars, arg("threshold"), arg("w_drop"), arg("w_base"),
             arg("eps"), arg("metric"), arg("top_p"));
  def<World>(m, setting, "reliability_from_drift", &reliability_from_drift<World>, array("drift"), array("mask"),
             array("cu_seqlens"), array("drift_count"), scalars, arg("w_drop"), arg("w_base"), arg("eps"));
  def<World>(m, setting, "token_stats", &token_stats<World>, array("student_logits"), array("teacher_logits"),
             array("mask"), array("token_ids"), scalars, arg("k"), arg("student_temperature"),
             arg("teacher_temperature"), arg("vocab_size"));
}

}  // namespace pruneopd::bindings
