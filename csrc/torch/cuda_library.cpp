// The operators for tensors on NVIDIA GPUs: the library pruneopd_kernels/_cuda.so.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "cuda/launch.h"
#include "cuda/operators.h"
#include "torch/world.h"

// The only symbol that a torch without CUDA lacks: weak, so that the library loads there too.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pruneopd::bindings {
namespace {

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("this torch has been built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

/// The device of the first tensor, and its current stream.
class CudaTensors : public TorchTensors {
 public:
  explicit CudaTensors(const Tensor& first) : is_cuda_(first.is_cuda()), index_(first.get_device_index()) {}

  std::string device() const { return is_cuda_ ? "cuda:" + std::to_string(index_) : "cuda"; }

  template <class T>
  Tensor empty(const Shape& shape) const {
    return torch::stable::empty(shape, kScalarType<T>, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_));
  }

  /// Memory may be given back as soon as the kernels that use it are on the stream: torch's allocator lends it out
  /// again to what comes after them on the same one.
  template <class Args>
  void compute(const Args& args) const {
    const torch::stable::accelerator::DeviceGuard guard(index_);
    cuda::require(cudaSetDevice(index_));  // of the CUDA runtime in this library, which is not torch's
    std::vector<Tensor> workspaces;
    const auto workspace = [&](int64_t bytes) -> void* {
      return workspaces.emplace_back(empty<uint8_t>({bytes})).mutable_data_ptr();
    };
    cuda::compute(args, {current_stream(index_), index_, workspace});
  }

 private:
  bool is_cuda_;
  int index_;
};

STABLE_TORCH_LIBRARY_IMPL(PRUNEOPD_LIBRARY, CUDA, m) {
  implement<CudaTensors>(m);
  implement_losses<CudaTensors>(m);
}

}  // namespace
}  // namespace pruneopd::bindings

/// "13.0 sm_80 sm_90 compute_90": the toolkit that built the library, and what it has code for; for ctypes
/// (pruneopd_kernels/dispatch/cuda.py).
extern "C" __attribute__((visibility("default"))) const char* pruneopd_cuda_build() { return PRUNEOPD_CUDA_BUILD; }
