// logprobs_backward, which the losses over candidates share: a block takes a position, or a slice of one.
#include "gradient.cuh"
#include "operators/logprobs_backward.h"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<1> rows;
  DeviceView topk_ids, coefficients, state, scale;
  int m;
  void* gradient;
  int64_t width;
};

struct Memory {
  double of_warps[kWarps][kMostTerms];
  double scale, total;  // over the temperature; of the coefficients
  RowState state;
  int ids[kMaxPolicyCandidates];  // -1: does not exist
  float coefficients[kMaxPolicyCandidates];

  __device__ static Memory& get() { return *reinterpret_cast<Memory*>(shared_memory); }
  /// The gradient in float64, of an id with coefficients of its own.
  __device__ float gradient(float logit, double temperature, double own) const {
    const double p = exp((static_cast<double>(logit) - state.reference) / temperature) / state.mass;
    return static_cast<float>(scale * (own - total * p));
  }
};

/// p times a factor: in float32, rounded the same way wherever it stands.
struct OfSoftmax {
  float reference;
  float log2_scale;  // log2(e) / temperature
  float factor;      // over the mass

  template <int kIds>
  __device__ bool operator()(const float (&logits)[1][kIds], float (&gradients)[kIds]) const {
#pragma unroll
    for (int i = 0; i < kIds; ++i) gradients[i] = one({logits[0][i]});
    return false;
  }
  __device__ float one(const float (&logit)[1]) const {
    return __fmul_rn(exp2_approximately(__fmul_rn(logit[0] - reference, log2_scale)), factor);
  }
};

/// Reads the candidates; returns whether any of them moves anything.
__device__ bool read_candidates(const Params& params, int n, double scale) {
  Memory& memory = Memory::get();
  double total[1] = {};
  bool moves = false;
  for (int j = thread_in_block(); j < params.m; j += kThreads) {
    const int64_t id = params.topk_ids.id(n, j);
    const auto coefficient = static_cast<float>(params.coefficients.real(n, j));
    memory.ids[j] = id >= 0 && id < params.rows.vocab_size ? static_cast<int>(id) : -1;
    memory.coefficients[j] = coefficient;
    total[0] += coefficient;
    moves |= coefficient != 0;
  }
  sum_over_block(total, memory.of_warps);
  if (thread_in_block() == 0) {
    memory.scale = scale;
    memory.total = total[0];
    memory.state = {static_cast<float>(params.state.real(n, 0)), static_cast<float>(params.state.real(n, 1))};
  }
  return __syncthreads_or(moves);
}

/// Overwrites the gradients of the candidates, each with the part of its own that it has in the sum.
template <class T>
__device__ void write_candidates(const GradientShare<T, 1>& share, int m, double temperature) {
  const Memory& memory = Memory::get();
#pragma unroll 1
  for (int j = thread_in_block(); j < m; j += kThreads) {
    const int row_id = memory.ids[j], id = row_id - share.first_id;
    if (row_id < 0 || !share.owns(id)) continue;
    double own = 0;
    bool is_first = true;
#pragma unroll 1
    for (int i = 0; i < m; ++i)
      if (memory.ids[i] == row_id) {
        own += memory.coefficients[i];
        is_first &= i >= j;
      }
    if (is_first) share.gradient.set(id, memory.gradient(share.rows[0].logit(id), temperature, own));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kLightBlocksPerMultiprocessor) logprobs_backward_kernel(Params params) {
  const Memory& memory = Memory::get();
  const Rows<1>& rows = params.rows;
  const int n = rows.position();
  const GradientShare<T, 1> share(rows, params.gradient, rows.logits[0].type, params.width, n);
  const double scale = params.scale.real(n) / rows.temperatures[0];
  if (scale == 0 || !read_candidates(params, n, scale)) return share.fill(0);
  const double factor = -memory.scale * memory.total;
  if (!(std::isfinite(factor) && std::isfinite(memory.total))) return share.fill(NAN);

  const OfSoftmax gradient{memory.state.reference, rows.scales[0], static_cast<float>(factor / memory.state.mass)};
  if (rows.usable_scales && std::isfinite(gradient.factor))
    share.stream(gradient);
  else
    share.write_singly([&](const float(&logit)[1]) { return memory.gradient(logit[0], rows.temperatures[0], 0); });
  __syncthreads();
  write_candidates(share, params.m, rows.temperatures[0]);
}

}  // namespace

template <>
void compute(const LogprobsBackwardArgs& args, const Queue& queue) {
  const Params params{make_rows(/*k=*/0, args.student), args.topk_ids, args.coefficients, args.state, args.scale,
                      static_cast<int>(args.m),         args.gradient, args.width};
  with_logit_type(args.student.rows.type, [&]<class T>() {
    launch_over_gradient<T>(&logprobs_backward_kernel<T>, args.positions, args.width, sizeof(Memory), params, queue);
  });
}

}  // namespace pruneopd::cuda
