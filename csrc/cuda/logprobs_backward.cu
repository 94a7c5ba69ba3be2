// logprobs_backward: a block takes a position, or a slice of one.
#include "gradient.cuh"
#include "operators/logprobs_backward.h"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<1> rows;
  DeviceView token_ids, coefficients, state, entropy_coefficient;
  int m;
  void* gradient;
  int64_t width;
};

struct Memory {
  double of_warps[kWarps][kMostTerms];
  double total, entropy;  // of the coefficients; the coefficient of the entropy
  RowState state;
  int ids[kMaxTokenIds];  // -1: does not exist
  double coefficients[kMaxTokenIds];

  __device__ static Memory& get() { return *reinterpret_cast<Memory*>(shared_memory); }
  /// The gradient in float64, of an id with coefficients of its own.
  __device__ double gradient(float logit, double temperature, double own) const {
    return (own - softmax_gradient(logit, state, temperature, total, entropy)) / temperature;
  }
};

/// exp2(d) * (constant + slope * d): in float32, rounded the same way wherever it stands.
struct OfSoftmax {
  float reference, scale;  // log2(e) / temperature
  float constant, slope;

  template <int kIds>
  __device__ bool operator()(const float (&logits)[1][kIds], float (&gradients)[kIds]) const {
#pragma unroll
    for (int i = 0; i < kIds; ++i) gradients[i] = one({logits[0][i]});
    return false;
  }
  __device__ float one(const float (&logit)[1]) const {
    const float d = fmaxf(__fmul_rn(logit[0] - reference, scale), -0x1p20f);  // finite, and its power is 0 before that
    return __fmul_rn(exp2_approximately(d), fmaf(slope, d, constant));
  }
};

/// Reads what position n has to learn from; returns whether that is anything.
__device__ bool read_coefficients(const Params& params, int n) {
  Memory& memory = Memory::get();
  const double entropy = params.entropy_coefficient ? params.entropy_coefficient.real(n) : 0;
  double total[1] = {};
  bool moves = entropy != 0;
  for (int j = thread_in_block(); j < params.m; j += kThreads) {
    const int64_t id = params.token_ids.id(n, j);
    const double coefficient = params.coefficients.real(n, j);
    memory.ids[j] = id >= 0 && id < params.rows.vocab_size ? static_cast<int>(id) : -1;
    memory.coefficients[j] = coefficient;
    total[0] += coefficient;
    moves |= coefficient != 0;
  }
  sum_over_block(total, memory.of_warps);
  if (thread_in_block() == 0) {
    memory.total = total[0];
    memory.entropy = entropy;
    memory.state = {params.state.real(n, 0), params.state.real(n, 1), params.state.real(n, 2)};
  }
  return __syncthreads_or(moves);
}

/// Overwrites the gradients of the candidates, each with the part of its own that it has in the sum.
template <class T>
__device__ void write_candidates(const GradientShare<T, T, 1>& share, int m, double temperature) {
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
__global__ void __launch_bounds__(kThreads, (kBlocks<T, false>)) logprobs_backward_kernel(Params params) {
  const Memory& memory = Memory::get();
  const Rows<1>& rows = params.rows;
  const int n = rows.position();
  const GradientShare<T, T, 1> share(rows, params.gradient, params.width, n);
  if (!read_coefficients(params, n)) return share.fill(0);
  const RowState& state = memory.state;
  if (!std::isfinite(memory.total + memory.entropy + state.reference + state.mass + state.mean)) return share.fill(NAN);

  const double temperature = rows.temperatures[0], scale = -1 / (temperature * state.mass);
  const double constant = scale * (memory.total - memory.entropy * state.mean), slope = scale * kLn2 * memory.entropy;
  if (rows.usable_scales && is_tame(constant) && is_tame(slope))
    share.stream(OfSoftmax{static_cast<float>(state.reference), rows.scales[0], static_cast<float>(constant),
                           static_cast<float>(slope)});
  else
    share.write_singly([&](const float(&logit)[1]) { return memory.gradient(logit[0], temperature, 0); });
  __syncthreads();
  write_candidates(share, params.m, temperature);
}

}  // namespace

template <>
void compute(const LogprobsBackwardArgs& args, const Queue& queue) {
  const Params params{make_rows(/*k=*/0, args.logits), args.token_ids,           args.coefficients, args.state,
                      args.entropy_coefficient,        static_cast<int>(args.m), args.gradient,     args.width};
  with_logit_type(params.rows, [&]<class T>() {
    launch_over_gradient<T>(&logprobs_backward_kernel<T>, args.positions, args.width, sizeof(Memory), params, queue);
  });
}

}  // namespace pruneopd::cuda
