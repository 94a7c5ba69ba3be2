// The operators for tensors on NVIDIA GPUs: the library pruneopd_kernels/_cuda.so.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "operators/list.h"
#include "torch/torch_call.h"

// The only symbol that a torch without CUDA lacks: weak, so that the library loads there too.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pruneopd {
namespace {

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("this torch has been built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

/// Runs on the device of the first tensor, on its current stream.
class CudaCall : public TorchCall {
 public:
  CudaCall(const char* op, StableIValue* stack, uint64_t count) : TorchCall(op, "", stack, count) {}

  Array tensor(const char* name) override {
    const Array described = TorchCall::tensor(name);
    if (device_.empty()) device_ = first().is_cuda() ? described.device : "cuda";
    return described;
  }

  /// torch's allocator lends memory out again only to later work on the same stream. So workspaces may be freed as soon
  /// as the kernels that use them are on the stream.
  template <class Args>
  void compute(const Args& args) const {
    const int device = first().get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    cuda::require(cudaSetDevice(device));  // of the CUDA runtime in this library, which is not torch's
    std::vector<Owned> workspaces;
    const auto workspace = [&](int64_t bytes) -> void* {
      return data_of(workspaces.emplace_back(empty_on_device_of(first(), {bytes}, ScalarType::Byte)));
    };
    cuda::compute(args, cuda::Queue{current_stream(device), device, workspace});
  }
};

STABLE_TORCH_LIBRARY_IMPL(PRUNEOPD_LIBRARY, CUDA, m) {
  for_each_operator([&]<class Args>() { m.impl(Args::kName, &run<CudaCall, Args>); });
}

}  // namespace
}  // namespace pruneopd

/// "13.0 sm_80 sm_90 compute_90": the toolkit that built the library, and what it has code for; for ctypes
/// (pruneopd_kernels/dispatch/cuda.py).
extern "C" __attribute__((visibility("default"))) const char* pruneopd_cuda_build() { return PRUNEOPD_CUDA_BUILD; }
