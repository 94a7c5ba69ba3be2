// topk_policy_loss: a block takes a position, or a slice of one.
#include "operators/topk_policy_loss.h"
#include "position.cuh"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<1> rows;
  DeviceView mask, topk_ids, advantages, old_logprobs;
  int m;
  PolicyClips clips;
  TopkPolicyLossArgs::Outputs out;
};

/// Whether a valid position has something to learn from.
__device__ bool is_used(const Params& params, int n) {
  bool learns = false;
  if (params.mask.flag(n))
    for (int j = thread_in_block(); j < params.m; j += kThreads)
      learns |= params.topk_ids.id(n, j) >= 0 && params.advantages.real(n, j) != 0;
  return __syncthreads_or(learns);
}

__device__ void write_unused(const Params& params, int n) {
  for (int j = thread_in_block(); j < params.m; j += kThreads) params.out.coefficients[int64_t{n} * params.m + j] = 0;
  if (thread_in_block() != 0) return;
  params.out.loss[n] = 0;
  state_at<RowState>(params.out.state, n) = {};
}

template <class T>
__device__ LossTerm term_of(const Params& params, int n, int j, const PositionMemory<1>& memory) {
  const int64_t id = params.topk_ids.id(n, j);
  if (id < 0) return {};
  const double logprob = candidate_logprob<T>(params.rows, memory, id);
  const double old = params.old_logprobs ? params.old_logprobs.real(n, j) : logprob;
  return policy_term(logprob, old, params.advantages.real(n, j), params.clips);
}

template <class T>
__device__ void write_position(const Params& params, int n) {
  PositionMemory<1>& memory = PositionMemory<1>::get();
  float* const coefficients = params.out.coefficients + int64_t{n} * params.m;
  double sums[1] = {};
#pragma unroll 1
  for (int j = thread_in_block(); j < params.m; j += kThreads) {
    const LossTerm term = term_of<T>(params, n, j, memory);
    sums[0] += term.value;
    coefficients[j] = static_cast<float>(term.derivative);
  }
  sum_over_block(sums, memory.summaries.of_warps);
  const auto loss = static_cast<float>(sums[0]);
  if (!std::isfinite(loss))
    for (int j = thread_in_block(); j < params.m; j += kThreads) coefficients[j] = NAN;
  if (thread_in_block() != 0) return;
  params.out.loss[n] = loss;
  state_at<RowState>(params.out.state, n) = RowState::of(memory.summary(params.rows, 0));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kLightBlocksPerMultiprocessor) topk_policy_loss_kernel(Params params) {
  const int n = params.rows.position();
  if (!is_used(params, n)) {
    if (params.rows.slice() == 0) write_unused(params, n);
  } else if (pass_position<T, Stats::kNone, /*kSelects=*/false>(params.rows, n)) {
    write_position<T>(params, PositionMemory<1>::get().position);
  }
}

}  // namespace

template <>
void compute(const TopkPolicyLossArgs& args, const Queue& queue) {
  const Params params{make_rows(/*k=*/0, args.student), args.mask,  args.topk_ids, args.advantages, args.old_logprobs,
                      static_cast<int>(args.m),         args.clips, args.out};
  with_logit_type(args.student.rows.type, [&]<class T>() {
    launch_over_logits<T>(&topk_policy_loss_kernel<T>, args.kName, args.positions, /*responses=*/0, params, queue);
  });
}

}  // namespace pruneopd::cuda
