// Tensors and responses as kernels see them: plain values that travel as a kernel's parameters.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../math/scalars.h"

namespace pruneopd::cuda {

/// Where position n lies: Positions without its vectors.
struct DevicePositions {
  static constexpr int kMaxAxes = 6;
  int64_t sizes[kMaxAxes], strides[kMaxAxes];
  int axes;

  explicit DevicePositions(const Positions& at) : sizes{}, strides{}, axes(static_cast<int>(at.axes())) {
    if (at.axes() > kMaxAxes)
      throw std::runtime_error(
          "impl='cuda': a tensor must have at most 6 leading axes that cannot be walked as one, got " +
          std::to_string(at.axes()));
    for (int axis = 0; axis < axes; ++axis) {
      sizes[axis] = at.size(axis);
      strides[axis] = at.stride(axis);
    }
  }

  __device__ int64_t offset(int64_t n) const {
    int64_t offset = 0;
#pragma unroll 1
    for (int axis = axes; axis-- > 1;) {
      offset += n % sizes[axis] * strides[axis];
      n /= sizes[axis];
    }
    return axes ? offset + n * strides[0] : 0;
  }
};

struct DeviceView {
  const void* data;
  Scalar type;
  DevicePositions at;
  int64_t step;

  DeviceView(const View& view) : data(view.data), type(view.type), at(view.at), step(view.step) {}

  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ const void* row(int64_t n) const { return static_cast<const char*>(data) + at.offset(n) * bytes_of(type); }
  __device__ double real(int64_t n, int64_t j = 0) const { return load_real(data, type, at.offset(n) + j * step); }
  __device__ int64_t id(int64_t n, int64_t j = 0) const { return load_id(data, type, at.offset(n) + j * step); }
  /// Whether position n is valid or drifts; a view that is not given is all true.
  __device__ bool flag(int64_t n) const { return !data || load_flag(data, type, at.offset(n)); }
};

/// How the positions make up responses. cu_seqlens may hold anything: no value of it leads out of [0, positions].
struct DeviceResponses {
  int64_t count, positions;
  DeviceView cu_seqlens;

  DeviceResponses(const Responses& responses)
      : count(responses.count), positions(responses.positions), cu_seqlens(responses.cu_seqlens) {}

  __device__ int64_t begin(int64_t b) const {
    if (!cu_seqlens) return b * (positions / count);
    const int64_t n = cu_seqlens.id(b);
    return n < 0 ? 0 : n > positions ? positions : n;
  }
  __device__ int64_t end(int64_t b) const { return begin(b + 1); }

  /// The response that position n belongs to, if any: the last one to begin at or before n. One warp searches together.
  __device__ int64_t find(int64_t n, int lane) const {
    if (!cu_seqlens) return n / (positions / count);
    int64_t low = 0, high = count;  // the answer lies in [low, high)
    while (high - low > 1) {
      const int64_t stride = (high - low + 31) / 32, probe = low + (lane + 1) * stride;
      const bool begun = probe < high && begin(probe) <= n;
      low += __popc(__ballot_sync(0xffffffffu, begun)) * stride;
      if (low + stride < high) high = low + stride;
    }
    return low;
  }
};

}  // namespace pruneopd::cuda
