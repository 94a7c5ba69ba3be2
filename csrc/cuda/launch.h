// Where CUDA kernels run, and how the host starts them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "../views.h"

namespace pruneopd::cuda {

/// A stream of one device, and device memory that lives as long as the work on the stream needs it. Nothing here waits
/// for the device, so that a CUDA graph can capture every call.
struct Queue {
  cudaStream_t stream;
  int device;  // the current one while an operator is computed
  std::function<void*(int64_t bytes)> workspace;
};

inline void require(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

inline int64_t device_attribute(cudaDeviceAttr attribute, const Queue& queue) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, attribute, queue.device));
  return value;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, const Queue& queue,
            const Arguments&... arguments) {
  if (blocks > INT32_MAX)
    throw std::runtime_error("impl='cuda': a call must have at most 2147483647 blocks of work, got " +
                             std::to_string(blocks));
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking)
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  [&](Parameters... parameters) {
    void* addresses[] = {static_cast<void*>(&parameters)...};
    require(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                             addresses, static_cast<size_t>(shared_bytes), queue.stream));
  }(arguments...);
}

}  // namespace pruneopd::cuda
