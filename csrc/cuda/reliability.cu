// reliability: one launch. A block takes a position (or a slice of one), and the last block of a response to finish
// scans the response.
#include "../math/drift.h"
#include "operators/reliability.h"
#include "position.cuh"
#include "scan.cuh"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<2> rows;
  DeviceView mask, token_ids;
  DriftRule drift_rule;
  RewardWeight reward_weight;
  ReliabilityArgs::Outputs out;
  Scan scan;
};

__device__ void write_masked(const Params& params, int n) {
  const int k = params.rows.k;
  for (int j = thread_in_block(); j < k; j += kThreads) {
    params.out.topk_ids[params.rows.slot(n, j)] = j;
    params.out.rewards[params.rows.slot(n, j)] = 0;
  }
  if (thread_in_block() == 0) {
    params.out.overlap[n] = 0;
    params.out.drift[n] = false;
  }
}

/// Whether the teacher's nucleus rejects the token of position n. An id that does not exist is not accepted.
__device__ bool rejected(const Params& params, int n, PositionMemory<2>& memory) {
  const int k = params.rows.k;
  double* const masses = memory.values[0];
  for (int j = thread_in_block(); j < k; j += kThreads)
    masses[j] = exp(memory.summaries.rows[1].logprob(memory.logit(1, j), params.rows.temperatures[1]));
  __syncthreads();
  if (thread_in_block() != 0) return false;
  const int64_t token = params.token_ids.id(n);
  Nucleus nucleus(params.drift_rule.top_p);
  for (int j = 0; j < k && !nucleus.closed; ++j) nucleus.add_mass(masses[j], memory.id(1, j) == token);
  return !nucleus.accepts();
}

/// r of position n (eq. 11 without L), for its k student candidates, at most one a thread.
template <class T>
__device__ void write_rewards(const Params& params, int n, PositionMemory<2>& memory) {
  const Rows<2>& rows = params.rows;
  const int k = rows.k, j = thread_in_block(), lane = thread_in_block() % kWarpSize;
  const RowSummary &student = memory.summaries.rows[0], &teacher = memory.summaries.rows[1];
  double p = -INFINITY, q = -INFINITY;
  if (j < k) {
    const auto row = make_row<T>(memory.logits[1], rows.logits[1].type, rows.vocab_size);
    p = student.logprob(memory.logit(0, j), rows.temperatures[0]);
    q = teacher.logprob(row.logit(memory.id(0, j)), rows.temperatures[1]);
  }
  double weight = 1.0 / k;
  if (params.reward_weight != RewardWeight::kNone) {
    const double of = params.reward_weight == RewardWeight::kStudent ? p : q;
    double* const maxima = memory.values[0];
    double* const masses = memory.values[1];
    const double warp_maximum = warp_max(of);
    if (lane == 0) maxima[thread_in_block() / kWarpSize] = warp_maximum;
    __syncthreads();
    double maximum = -INFINITY;
    for (int warp = 0; warp < kWarps; ++warp) maximum = maxima[warp] > maximum ? maxima[warp] : maximum;
    const double mass = maximum > -INFINITY && j < k ? exp(of - maximum) : 0, warp_mass = warp_sum(mass);
    if (lane == 0) masses[thread_in_block() / kWarpSize] = warp_mass;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += masses[warp];
    weight = mass / total;
    if (maximum == -INFINITY) p = q;  // no mass to renormalise, no reward
  }
  if (j < k) params.out.rewards[params.rows.slot(n, j)] = static_cast<float>(reward_of(p, q, weight));
}

template <class T>
__device__ void write_position(const Params& params, int n) {
  PositionMemory<2>& memory = PositionMemory<2>::get();
  const int k = params.rows.k, j = thread_in_block();
  bool hit = false;
  if (j < k) {
    const int id = memory.id(0, j);
    params.out.topk_ids[params.rows.slot(n, j)] = id;
    for (int i = 0; i < k; ++i) hit |= memory.id(1, i) == id;
  }
  const bool broken = memory.broken();
  const int hits = __syncthreads_count(hit), common = broken ? 0 : hits;
  const bool drift = broken || (params.drift_rule.metric == Metric::kOverlap
                                    ? drifts_by_overlap(common, k, params.drift_rule.threshold)
                                    : rejected(params, n, memory));
  if (thread_in_block() == 0) {
    params.out.overlap[n] = static_cast<float>(overlap_of(common, k));
    params.out.drift[n] = drift;
  }
  __syncthreads();
  if (!broken)
    write_rewards<T>(params, n, memory);
  else if (j < k)
    params.out.rewards[params.rows.slot(n, j)] = NAN;
}

/// After position n is written: whoever completes a response scans it.
__device__ void arrive(const Params& params, int n, bool& is_last) {
  const DeviceResponses& responses = params.scan.responses;
  const int64_t b = responses.find(n, thread_in_block() % kWarpSize);
  const int64_t begin = responses.begin(b), end = responses.end(b);
  if (n < begin || n >= end) return;  // cu_seqlens leave it out
  unsigned* const arrivals = params.rows.arrivals + (params.rows.slices > 1 ? responses.positions : 0) + b;
  if (arrives_last(arrivals, end - begin, is_last)) scan_response(params.scan, b);
}

/// Nobody arrives at a response without positions.
__device__ void write_empty_responses(const Scan& scan) {
  if (!scan.responses.cu_seqlens) return;
  for (int64_t b = thread_in_block(); b < scan.responses.count; b += kThreads)
    if (scan.responses.begin(b) >= scan.responses.end(b)) scan.out.effective_length[b] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) reliability_kernel(Params params) {
  PositionMemory<2>& memory = PositionMemory<2>::get();
  const int n = params.rows.position();
  if (blockIdx.x == 0) write_empty_responses(params.scan);
  if (!params.mask.flag(n)) {
    if (params.rows.slice() != 0) return;
    write_masked(params, n);
  } else {
    if (!pass_position<T, Stats::kNone, true>(params.rows, n)) return;
    write_position<T>(params, memory.position);
  }
  arrive(params, n, memory.is_last);
}

}  // namespace

template <>
void compute(const ReliabilityArgs& args, const Queue& queue) {
  const int64_t positions = args.responses.positions;
  if (args.responses.count == 0) return;
  if (positions == 0) {
    const auto bytes = static_cast<size_t>(args.responses.count) * sizeof(int32_t);
    return require(cudaMemsetAsync(args.out.scan.effective_length, 0, bytes, queue.stream));
  }
  Params params{
      make_rows(args.k, args.student, args.teacher),
      args.mask,
      args.token_ids,
      args.drift_rule,
      args.reward_weight,
      args.out,
      Scan(args.mask, view_of_flags(args.out.drift, positions), args.responses, args.scan_rule, args.out.scan)};
  params.scan.rewards = args.out.rewards;
  params.scan.k = static_cast<int>(args.k);
  with_logit_type(args.student, args.teacher, [&]<class T>() {
    launch_over_logits<T>(&reliability_kernel<T>, args.kName, positions, args.responses.count, params, queue);
  });
}

}  // namespace pruneopd::cuda
