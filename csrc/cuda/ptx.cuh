// Instructions that CUDA C++ has no words for, each with its meaning in plain C++ for whoever compiles this for a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../math/scalars.h"

namespace pruneopd::cuda {

/// 2^x to two units in the last place; 0 where that would be subnormal.
__device__ __forceinline__ float exp2_approximately(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
#endif
}

/// The larger one, or the lesser one; NaN if either is.
template <bool kLeast = false>
__device__ __forceinline__ float extreme(float a, float b) {
#ifdef __CUDA_ARCH__
  float c;
  if constexpr (kLeast)
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  else
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a ? a : b != b ? b : (a < b) == kLeast ? a : b;
#endif
}

/// The same for two values in each word.
template <class T, bool kLeast>
__device__ __forceinline__ uint32_t extreme_2(uint32_t a, uint32_t b) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDA_ARCH__
  uint32_t c;
  if constexpr (std::is_same_v<T, BFloat16> && kLeast)
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else if constexpr (std::is_same_v<T, BFloat16>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else if constexpr (kLeast)
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  uint32_t c = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const float fx = to_float(T{x}), fy = to_float(T{y});
    c |= static_cast<uint32_t>(fx != fx ? x : fy != fy ? y : (fx < fy) == kLeast ? x : y) << shift;
  }
  return c;
#endif
}

/// Two halves as floats.
template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    low = bits_float(word << 16);
    high = bits_float(word & 0xffff0000u);
  } else {
#ifdef __CUDA_ARCH__
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(word));
#else
    low = to_float(Half{static_cast<uint16_t>(word)});
    high = to_float(Half{static_cast<uint16_t>(word >> 16)});
#endif
  }
}

/// Two floats as halves, each rounded to the nearest, of two to the even one.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return uint32_t{from_float<T>(high).bits} << 16 | from_float<T>(low).bits;
#endif
}

template <class T>
__device__ __forceinline__ T round_to(float x) {
  if constexpr (sizeof(T) == 2)
    return {static_cast<uint16_t>(pack<T>(x, 0))};
  else
    return x;
}

/// threadIdx.x, read again wherever it stands: what follows from it need not be kept in registers through a long
/// kernel.
__device__ __forceinline__ int thread_in_block() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

/// 16 aligned bytes of what nobody writes, which are not worth a place in the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#else
  return *address;
#endif
}

__device__ __forceinline__ uint2 load_once(const uint2* address) { return *address; }

/// 16 aligned bytes that nobody will soon read.
__device__ __forceinline__ void store_once(uint4* address, const uint4& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  *address = v;
#endif
}

}  // namespace pruneopd::cuda
