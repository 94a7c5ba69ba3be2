// The part of CUDA's runtime header that csrc/cuda uses, for a C++ compiler that knows nothing of CUDA: found in place
// of the real one, it makes the same sources run on a CPU (see emulator.h). Memory of the device is memory of the host,
// and what is put on a stream is done at once.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../emulator.h"

// --- keywords ------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
// The compiler refuses this inside of a function without `extern`: only the dynamic shared memory is emulated.
#define __shared__ __attribute__((weak))

// --- types ---------------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
} __align__(8);
struct uint4 {
  unsigned x, y, z, w;
} __align__(16);

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- barriers, fences, atomics -------------------------------------------------------------------------------------

inline void __syncthreads(emulator::Place place = emulator::Place::current()) {
  emulator::block_barrier("__syncthreads", false, place);
}
inline int __syncthreads_or(int condition, emulator::Place place = emulator::Place::current()) {
  return emulator::block_barrier("__syncthreads_or", condition != 0, place) > 0;
}
inline int __syncthreads_count(int condition, emulator::Place place = emulator::Place::current()) {
  return emulator::block_barrier("__syncthreads_count", condition != 0, place);
}
inline void __threadfence(emulator::Place place = emulator::Place::current()) { emulator::thread_fence(place); }

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  const T before = __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
  emulator::note_atomic(at);
  return before;
}

// --- warps ---------------------------------------------------------------------------------------------------------

namespace emulator {

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
T shuffle(const char* name, unsigned mask, T value, int source, Place place) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return std::bit_cast<T>(static_cast<Bits>(shuffle(name, mask, uint64_t{std::bit_cast<Bits>(value)}, source, place)));
}

inline int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }

}  // namespace emulator

template <emulator::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Place place = emulator::Place::current()) {
  const int from = (emulator::lane() & -width) | (source & (width - 1));
  return emulator::shuffle("__shfl_sync", mask, value, from, place);
}
template <emulator::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  emulator::Place place = emulator::Place::current()) {
  const int lane = emulator::lane(), from = lane ^ lanes;
  return emulator::shuffle("__shfl_xor_sync", mask, value, from > (lane | (width - 1)) ? lane : from, place);
}

inline unsigned __ballot_sync(unsigned mask, int condition, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot("__ballot_sync", mask, condition != 0, place);
}
inline int __any_sync(unsigned mask, int condition, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot("__any_sync", mask, condition != 0, place) != 0;
}

template <class T>
concept Reduced = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;

template <Reduced T>
T __reduce_max_sync(unsigned mask, T value, emulator::Place place = emulator::Place::current()) {
  const auto join = [](uint64_t a, uint64_t b) -> uint64_t { return std::max(static_cast<T>(a), static_cast<T>(b)); };
  return static_cast<T>(emulator::reduce("__reduce_max_sync", mask, static_cast<uint64_t>(value), join, place));
}
template <Reduced T>
T __reduce_min_sync(unsigned mask, T value, emulator::Place place = emulator::Place::current()) {
  const auto join = [](uint64_t a, uint64_t b) -> uint64_t { return std::min(static_cast<T>(a), static_cast<T>(b)); };
  return static_cast<T>(emulator::reduce("__reduce_min_sync", mask, static_cast<uint64_t>(value), join, place));
}
template <Reduced T>
T __reduce_add_sync(unsigned mask, T value, emulator::Place place = emulator::Place::current()) {
  const auto join = [](uint64_t a, uint64_t b) { return a + b; };
  return static_cast<T>(emulator::reduce("__reduce_add_sync", mask, static_cast<uint64_t>(value), join, place));
}

// --- numbers -------------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }

template <class T>
T __ldcg(const T* at) {
  return *at;
}

// As in CUDA: of two floating-point numbers the one that is not NaN.
template <class A, class B, class T = std::common_type_t<A, B>>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class T = std::common_type_t<A, B>>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// --- the host's side -----------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t emulator_launch(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                            const std::function<void()>& thread);
cudaError_t emulator_set_shared_limit(const void* kernel, cudaFuncAttribute attribute, int bytes);

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, void** arguments,
                             size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return [&]<size_t... n>(std::index_sequence<n...>) {
    const auto* const key = reinterpret_cast<const void*>(kernel);
    const emulator::Body body = emulator::body_of(key);
    return emulator_launch(key, grid, threads, shared_bytes, [&] {
      if (body) return body(arguments);
      kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[n])...);
    });
  }(std::index_sequence_for<Parameters...>());
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return emulator_set_shared_limit(reinterpret_cast<const void*>(kernel), attribute, value);
}
