// topk_policy_loss: a block takes a position, or a slice of one.
#include "../math/loss.h"
#include "candidates.cuh"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<1> rows;
  DeviceView mask, topk_ids, advantages, old_logprobs;
  int m;
  PolicyClips clips;
  float *loss, *coefficients, *state;
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
  for (int j = thread_in_block(); j < params.m; j += kThreads) params.coefficients[int64_t{n} * params.m + j] = 0;
  if (thread_in_block() != 0) return;
  params.loss[n] = 0;
  write_state(params.state, n, 0, 0);
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
  float* const coefficients = params.coefficients + int64_t{n} * params.m;
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
  params.loss[n] = loss;
  write_state(params.state, n, params.rows, memory);
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

void compute(const TopkPolicyLossArgs& args, const Queue& queue) {
  if (args.positions == 0) return;
  const Params params{.rows = make_rows(args.student, /*k=*/0),
                      .mask = DeviceView(args.mask),
                      .topk_ids = DeviceView(args.topk_ids),
                      .advantages = DeviceView(args.advantages),
                      .old_logprobs = DeviceView(args.old_logprobs),
                      .m = static_cast<int>(args.m),
                      .clips = {args.clip_low, args.clip_high, args.clip_dual},
                      .loss = args.loss,
                      .coefficients = args.coefficients,
                      .state = args.state};
  with_logit_type(args.student.rows.type, [&]<class T>() {
    launch_over_logits<T>(&topk_policy_loss_kernel<T>, "topk_policy_loss", args.student.vocab_size, args.positions,
                          /*responses=*/0, params, queue);
  });
}

}  // namespace pruneopd::cuda
