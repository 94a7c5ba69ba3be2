// reliability_from_topk: overlap and drift of every position, then the scan of every response.
#include "../math/drift.h"
#include "operators/reliability_from_topk.h"
#include "scan.cuh"

namespace pruneopd::cuda {
namespace {

constexpr int kThreads = 256;

struct Params {
  DeviceView topk_ids[2], topk_logprobs[2];  // 0 is the student's, 1 the teacher's
  DeviceView mask, token_ids;
  int64_t positions;
  int k, slots;  // threads a position: k rounded up to a power of two
  DriftRule drift_rule;
  ReliabilityFromTopkArgs::Outputs out;
};

struct Memory {
  int64_t ids[2][kThreads];  // -1: an empty slot
  double masses[kThreads];   // of the teacher's
  int sizes[2][kThreads], hits[kThreads];

  __device__ static Memory& get() { return *reinterpret_cast<Memory*>(shared_memory); }
};

/// Whether the teacher's nucleus rejects the token of position n, whose slots begin at `first`.
__device__ bool rejected(const Params& params, int64_t n, int first) {
  const Memory& memory = Memory::get();
  const int64_t token = params.token_ids.id(n);
  Nucleus nucleus(params.drift_rule.top_p);
  for (int j = first; j < first + params.k; ++j)
    if (memory.ids[1][j] >= 0) nucleus.add_mass(memory.masses[j], memory.ids[1][j] == token);
  return !nucleus.accepts();
}

/// Each block takes kThreads / slots positions, each thread a slot of one. An id that a set holds twice counts once.
__global__ void __launch_bounds__(kThreads) drift_kernel(Params params) {
  Memory& memory = Memory::get();
  const int thread = threadIdx.x, slot = thread % params.slots, first = thread - slot;
  const int64_t n = int64_t{blockIdx.x} * (kThreads / params.slots) + thread / params.slots;
  const bool valid = n < params.positions && params.mask.flag(n), used = valid && slot < params.k;
  int64_t ids[2] = {-1, -1};
  memory.hits[thread] = 0;
  for (int side = 0; side < 2; ++side) {
    const DeviceView& logprobs = params.topk_logprobs[side];
    if (used) ids[side] = params.topk_ids[side].id(n, slot);
    const double logprob = ids[side] >= 0 && logprobs ? logprobs.real(n, slot) : 0;
    if (logprob == -INFINITY) ids[side] = -1;
    if (side == 1) memory.masses[thread] = exp(logprob);
    memory.ids[side][thread] = ids[side];
    memory.sizes[side][thread] = 0;
  }
  __syncthreads();
  bool again[2] = {}, hit = false;
  for (int j = first; j < first + params.k; ++j) {
    for (int side = 0; side < 2; ++side) again[side] |= j < thread && memory.ids[side][j] == ids[side];
    hit |= memory.ids[1][j] == ids[0];
  }
  __syncthreads();
  for (int side = 0; side < 2; ++side) {
    if (ids[side] >= 0 && !again[side]) atomicAdd(&memory.sizes[side][first], 1);
    if (again[side]) memory.ids[side][thread] = -1;
  }
  if (hit && ids[0] >= 0 && !again[0]) atomicAdd(&memory.hits[first], 1);
  __syncthreads();
  if (slot != 0 || n >= params.positions) return;
  const double overlap = overlap_of(memory.hits[first], memory.sizes[0][first], memory.sizes[1][first]);
  params.out.overlap[n] = static_cast<float>(overlap);
  params.out.drift[n] = valid && (params.drift_rule.metric == Metric::kOverlap ? overlap < params.drift_rule.threshold
                                                                               : rejected(params, n, first));
}

}  // namespace

template <>
void compute(const ReliabilityFromTopkArgs& args, const Queue& queue) {
  int slots = 1;
  while (slots < args.k) slots *= 2;
  const int64_t positions = args.responses.positions;
  const Params params{{args.student_topk_ids, args.teacher_topk_ids},
                      {args.student_topk_logprobs, args.teacher_topk_logprobs},
                      args.mask,
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
