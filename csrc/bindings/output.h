// The outputs of an operator, in the kind of tensor that its caller uses.
#pragma once

#include "bindings/guard.h"

namespace pruneopd::bindings {

/// A world is where tensors come from and operators run, for one call. It has
///   Tensor, Text                  what holds a tensor, and a string argument
///   describe(tensor) -> Array
///   empty_like(tensor)            of the same shape, dtype and device, contiguous and not initialised
///   device()                      where every tensor of the call must be
///   empty<T>(shape) -> Tensor     on that device, contiguous and not initialised;  data<T>(tensor) -> T*
///   compute(args)                 what csrc/operators.h describes
template <class World, class T>
struct Output {
  Output(const World& world, const Shape& shape) : tensor(world.template empty<T>(shape)) {}
  operator T*() { return World::template data<T>(tensor); }

  typename World::Tensor tensor;
};

template <class World>
MaybeArray describe(const std::optional<typename World::Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return World::describe(*tensor);
}

}  // namespace pruneopd::bindings
