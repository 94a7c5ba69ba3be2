// Operators over NumPy arrays: what a pybind11 module of them needs, except where they run.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "operators/list.h"

namespace pruneopd {

namespace py = pybind11;

/// A call from Python: arguments by position or by name. Arrays are taken as they are, without conversion or copy.
class NumPyCall : public Call {
 public:
  NumPyCall(const char* op, const py::args& args, const py::kwargs& kwargs)
      : Call(op, "cpu"), args_(args), kwargs_(kwargs) {}

  Array tensor(const char* name) override { return describe(next(name)); }
  MaybeArray optional_tensor(const char* name) override {
    const py::object array = next(name);
    if (array.is_none()) return std::nullopt;
    return describe(array);
  }
  int64_t integer(const char* name) override { return next(name).cast<int64_t>(); }
  std::optional<int64_t> optional_integer(const char* name) override {
    return next(name).cast<std::optional<int64_t>>();
  }
  double number(const char* name) override { return next(name).cast<double>(); }
  bool boolean(const char* name) override { return next(name).cast<bool>(); }
  std::string text(const char* name) override { return next(name).cast<std::string>(); }

  /// The outputs: one, or a tuple of them.
  py::object outputs() const { return py::len(outputs_) == 1 ? py::object(outputs_[0]) : py::tuple(outputs_); }
  void check_all_read() const {
    if (read_ != args_.size() + kwargs_.size()) throw py::type_error(std::string(op_) + ": too many arguments");
  }

 protected:
  void* make_output(const Shape& shape, std::optional<Scalar> type) override {
    outputs_.append(py::array(type ? numpy_type(*type) : first_type_, shape));
    return last_output().mutable_data();
  }
  py::array last_output() const { return outputs_[outputs_.size() - 1].cast<py::array>(); }

 private:
  py::object next(const char* name) {
    if (read_ < args_.size()) return args_[read_++];
    if (!kwargs_.contains(name)) throw py::type_error(std::string(op_) + ": " + name + " is missing");
    ++read_;
    return kwargs_[name];
  }
  Array describe(const py::object& argument) {
    if (!py::isinstance<py::array>(argument)) throw py::type_error(std::string(op_) + ": an argument is no array");
    const auto array = py::reinterpret_borrow<py::array>(argument);
    const py::dtype dtype = array.dtype();
    if (read_ == 1) first_type_ = dtype;
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
  static py::dtype numpy_type(Scalar type) {
    return type == Scalar::kBool  ? py::dtype::of<bool>()
           : type == Scalar::kI32 ? py::dtype::of<int32_t>()
           : type == Scalar::kI64 ? py::dtype::of<int64_t>()
           : type == Scalar::kF64 ? py::dtype::of<double>()
                                  : py::dtype::of<float>();
  }

  py::args args_;
  py::kwargs kwargs_;
  size_t read_ = 0;
  py::dtype first_type_;
  py::list outputs_;
};

/// Defines every operator, with `num_threads` as the last argument. `run(args, num_threads)` computes one.
template <class OneCall, class Run>
void define_operators(py::module_& m, const Run& run) {
  for_each_operator([&]<class Args>() {
    m.def(Args::kName, [run](const py::args& arguments, const py::kwargs& names) {
      OneCall call(Args::kName, arguments, names);
      const Args args = Args::from(call);
      const int64_t num_threads = call.integer("num_threads");
      call.check_all_read();
      run(args, num_threads);
      return call.outputs();
    });
  });
}

}  // namespace pruneopd
