// reliability_from_topk: overlap and drift of every position, then the scan of every response.
#include "../math/drift.h"
#include "operators/reliability_from_topk.h"
#include "scan.cuh"

namespace pruneopd::cuda {
namespace {

constexpr int kThreads = 256;

struct Params {
  DeviceView student_topk_ids, teacher_topk_ids, mask, teacher_topk_logprobs, token_ids;
  int64_t positions;
  int k, slots;  // threads a position: k rounded up to a power of two
  DriftRule drift_rule;
  ReliabilityFromTopkArgs::Outputs out;
};

struct Memory {
  int64_t teacher_ids[kThreads];
  double masses[kThreads];
  int counts[kThreads];

  __device__ static Memory& get() { return *reinterpret_cast<Memory*>(shared_memory); }
};

/// Whether the teacher's nucleus rejects the token of position n. A padding slot has no mass; a NaN rejects the token.
__device__ bool rejected(const Params& params, int64_t n, const int64_t* teacher_ids, const double* masses) {
  const int64_t token = params.token_ids.id(n);
  Nucleus nucleus(params.drift_rule.top_p);
  for (int j = 0; j < params.k; ++j)
    if (teacher_ids[j] >= 0) nucleus.add_mass(masses[j], teacher_ids[j] == token);
  return !nucleus.accepts();
}

/// Each block takes kThreads / slots positions, each thread a slot of one.
__global__ void __launch_bounds__(kThreads) drift_kernel(Params params) {
  Memory& memory = Memory::get();
  const int thread = threadIdx.x, slot = thread % params.slots, first = thread - slot;
  const int64_t n = int64_t{blockIdx.x} * (kThreads / params.slots) + thread / params.slots;
  const bool valid = n < params.positions && params.mask.flag(n), used = valid && slot < params.k;
  const int64_t student_id = used ? params.student_topk_ids.id(n, slot) : -1;
  const int64_t teacher_id = used ? params.teacher_topk_ids.id(n, slot) : -1;
  memory.teacher_ids[thread] = teacher_id;
  memory.counts[thread] = 0;
  if (params.drift_rule.metric == Metric::kTopP)
    memory.masses[thread] = teacher_id < 0 ? 0 : exp(params.teacher_topk_logprobs.real(n, slot));
  __syncthreads();
  bool hit = false;
  for (int j = 0; j < params.k; ++j) hit |= memory.teacher_ids[first + j] == student_id;
  if (hit && student_id >= 0) atomicAdd(&memory.counts[first], 1);
  __syncthreads();
  if (slot != 0 || n >= params.positions) return;
  const int common = memory.counts[first];
  params.out.overlap[n] = static_cast<float>(overlap_of(common, params.k));
  params.out.drift[n] = valid && (params.drift_rule.metric == Metric::kOverlap
                                      ? drifts_by_overlap(common, params.k, params.drift_rule.threshold)
                                      : rejected(params, n, memory.teacher_ids + first, memory.masses + first));
}

}  // namespace

template <>
void compute(const ReliabilityFromTopkArgs& args, const Queue& queue) {
  int slots = 1;
  while (slots < args.k) slots *= 2;
  const int64_t positions = args.responses.positions;
  const Params params{args.student_topk_ids,
                      args.teacher_topk_ids,
                      args.mask,
                      args.teacher_topk_logprobs,
                      args.token_ids,
                      positions,
                      static_cast<int>(args.k),
                      slots,
                      args.drift_rule,
                      args.out};
  const int64_t positions_per_block = kThreads / slots;
  if (positions > 0)
    launch(&drift_kernel, (positions + positions_per_block - 1) / positions_per_block, kThreads, sizeof(Memory), queue,
           params);
  scan_responses(
      Scan(args.mask, view_of_flags(args.out.drift, positions), args.responses, args.scan_rule, args.out.scan), queue);
}

}  // namespace pruneopd::cuda
