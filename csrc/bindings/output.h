// The outputs of an operator, in the kind of tensor that its caller uses.
#pragma once

#include "bindings/guard.h"

namespace pruneopd::bindings {

/// A world is where tensors come from: Torch (csrc/torch) or NumPy (csrc/host). It has
///   Tensor, Text                  what holds a tensor, and a string argument
///   describe(tensor) -> Array
///   empty<T>(shape) -> Tensor     contiguous and not initialised;  data<T>(tensor) -> T*
///   run(f)                        calls f(const ParallelFor&)
template <class World, class T>
struct Output {
  explicit Output(const Shape& shape) : tensor(World::template empty<T>(shape)) {}
  operator T*() { return World::template data<T>(tensor); }

  typename World::Tensor tensor;
};

template <class World>
MaybeArray describe(const std::optional<typename World::Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return World::describe(*tensor);
}

}  // namespace pruneopd::bindings
