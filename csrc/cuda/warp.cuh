// What the 32 threads of a warp compute together, and arrays in registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pruneopd::cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

/// In an order that is always the same; every thread gets the result.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int apart = kWarpSize / 2; apart; apart /= 2) value += __shfl_xor_sync(kWholeWarp, value, apart);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int apart = kWarpSize / 2; apart; apart /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, apart);
    value = value < other ? other : value;
  }
  return value;
}

/// How many of the threads before this one have the bit set.
__device__ __forceinline__ int count_before(unsigned ballot, int lane) { return __popc(ballot & ((1u << lane) - 1)); }

// Elements of an array that stays in registers although the compiler does not know their number.

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
