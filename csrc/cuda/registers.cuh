// Arrays that stay in registers although the compiler does not know the number of an element.
#pragma once

#include <cuda_runtime.h>

namespace pruneopd::cuda {

template <class One, int kCount>
__device__ __forceinline__ void put(One (&values)[kCount], int j, const One& value) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i == j) values[i] = value;
}

template <class One, int kCount>
__device__ __forceinline__ One pick(const One (&values)[kCount], int j) {
  One value = values[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i)
    if (i == j) value = values[i];
  return value;
}

}  // namespace pruneopd::cuda
