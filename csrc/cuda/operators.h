// The operators over memory of a GPU: what the torch library (csrc/torch/cuda_library.cpp) calls. Nothing here waits
// for the device, so that a CUDA graph can capture every call.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "../operators.h"

namespace pruneopd::cuda {

/// Where kernels run: a stream of one device, and memory there that lives as long as what is put on the stream needs
/// it.
struct Queue {
  cudaStream_t stream;
  int device;  // the current one while compute runs
  std::function<void*(int64_t bytes)> workspace;
};

/// Each throws std::runtime_error where CUDA refuses.
void compute(const ReliabilityArgs& args, const Queue& queue);
void compute(const ReliabilityFromTopkArgs& args, const Queue& queue);
void compute(const ReliabilityFromDriftArgs& args, const Queue& queue);
void compute(const TokenStatsArgs& args, const Queue& queue);
void compute(const TopkPolicyLossArgs& args, const Queue& queue);
void compute(const TopkForwardKlArgs& args, const Queue& queue);
void compute(const ReverseKlArgs& args, const Queue& queue);
void compute(const LogprobsBackwardArgs& args, const Queue& queue);
void compute(const ReverseKlBackwardArgs& args, const Queue& queue);

}  // namespace pruneopd::cuda
