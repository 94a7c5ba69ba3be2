// reliability and opd_scores: one launch. The last block of a response to finish scans the response.
#include "../math/drift.h"
#include "operators/reliability.h"
#include "position.cuh"
#include "scan.cuh"

namespace pruneopd::cuda {
namespace {

template <Stats kSums>
struct Reliability {
  static constexpr Stats kStats = kSums;
  static constexpr bool kSelects = true;

  Rows<2> rows;
  DeviceView mask, token_ids;
  DriftRule drift_rule;
  RewardWeight reward_weight;
  bool divergence;  // whether all of the state is wanted
  ReliabilityArgs::Outputs out;
  Scan scan;

  __device__ bool reads(int n) const { return mask.flag(n); }

  __device__ void write_unread(int n) const {
    for (int j = thread_in_block(); j < rows.k; j += kThreads) out.topk_ids[rows.slot(n, j)] = j;
    if (thread_in_block() != 0) return;
    out.overlap[n] = 0;
    out.drift[n] = false;
    if (!out.accepted) return;
    out.accepted[n] = false;
    out.student_entropy[n] = out.teacher_entropy[n] = 0;
    out.reverse_kl[n] = 0;
    state_at<DivergenceState>(out.state, n) = {};
  }

  /// Whether the teacher's nucleus accepts the token of position n. By the whole block, for its first thread.
  __device__ bool accepts(int n, int filled, PositionMemory<2>& memory) const {
    double* const masses = memory.values[0];
    for (int j = thread_in_block(); j < filled; j += kThreads)
      masses[j] = exp(memory.summaries.rows[1].logprob(memory.logit(1, j), rows.temperatures[1]));
    __syncthreads();
    if (thread_in_block() != 0) return false;
    const int64_t token = token_ids.id(n);
    Nucleus nucleus(drift_rule.top_p);
    for (int j = 0; j < filled && !nucleus.closed; ++j) nucleus.add_mass(masses[j], memory.id(1, j) == token);
    return nucleus.accepts();
  }

  /// r of position n (eq. 11 without L), for its student candidates that are not empty, at most one a thread.
  template <class T>
  __device__ double reward(int filled, PositionMemory<2>& memory) const {
    const int j = thread_in_block(), lane = thread_in_block() % kWarpSize;
    const RowSummary &student = memory.summaries.rows[0], &teacher = memory.summaries.rows[1];
    double p = -INFINITY, q = -INFINITY;
    if (j < filled) {
      const auto row = make_row<T>(memory.logits[1], rows.logits[1].type, rows.vocab_size);
      p = student.logprob(memory.logit(0, j), rows.temperatures[0]);
      q = teacher.logprob(row.logit(memory.id(0, j)), rows.temperatures[1]);
    }
    double weight = 1.0 / filled;
    if (reward_weight != RewardWeight::kNone) {
      const double of = reward_weight == RewardWeight::kStudent ? p : q;
      double* const maxima = memory.values[0];
      double* const masses = memory.values[1];
      const double warp_maximum = warp_max(of);
      if (lane == 0) maxima[thread_in_block() / kWarpSize] = warp_maximum;
      __syncthreads();
      double maximum = -INFINITY;
      for (int warp = 0; warp < kWarps; ++warp) maximum = maxima[warp] > maximum ? maxima[warp] : maximum;
      const double mass = maximum > -INFINITY && j < filled ? exp(of - maximum) : 0, warp_mass = warp_sum(mass);
      if (lane == 0) masses[thread_in_block() / kWarpSize] = warp_mass;
      __syncthreads();
      double total = 0;
      for (int warp = 0; warp < kWarps; ++warp) total += masses[warp];
      weight = mass / total;
      if (maximum == -INFINITY) p = q;  // no mass to renormalise, no reward
    }
    return reward_of(p, q, weight);
  }

  template <class T>
  __device__ void write(int n) const {
    PositionMemory<2>& memory = PositionMemory<2>::get();
    const int k = rows.k, j = thread_in_block();
    const int student_size = memory.filled(0, k), teacher_size = memory.filled(1, k);
    const int id = j < k ? memory.id(0, j) : 0;
    if (j < k) out.topk_ids[rows.slot(n, j)] = id;
    const bool hit = memory.is_in_row_1(j < student_size, id, teacher_size);
    const bool broken = memory.broken(), by_overlap = drift_rule.metric == Metric::kOverlap;
    const int hits = __syncthreads_count(hit);
    const double overlap = broken ? 0 : overlap_of(hits, student_size, teacher_size);
    const bool accepted = token_ids && (out.accepted || !by_overlap) && !broken && accepts(n, teacher_size, memory);
    if (thread_in_block() == 0) {
      out.overlap[n] = static_cast<float>(overlap);
      out.drift[n] = broken || (by_overlap ? overlap < drift_rule.threshold : !accepted);
      if (out.accepted) write_sums(n, accepted, memory);
    }
    __syncthreads();
    const double r = !broken ? reward<T>(student_size, memory) : j < student_size || memory.broken(0) ? NAN : 0;
    if (j < k) scan.unweighted[rows.slot(n, j)] = r;
  }

  /// What opd_scores adds.
  __device__ void write_sums(int n, bool accepted, const PositionMemory<2>& memory) const {
    const RowSummary student = memory.summary(rows, 0), teacher = memory.summary(rows, 1);
    const double kl = kStats == Stats::kNone ? 0 : memory.summaries.divergences[0];
    auto state = DivergenceState::of(student, teacher, kl, memory.summaries.peak_excess);
    if (!divergence) state = {state.reference, state.mass, 0, 0, 0};
    state_at<DivergenceState>(out.state, n) = state;
    out.accepted[n] = accepted;
    out.student_entropy[n] = kStats == Stats::kAll ? static_cast<float>(student.entropy()) : 0;
    out.teacher_entropy[n] = kStats == Stats::kAll ? static_cast<float>(teacher.entropy()) : 0;
    out.reverse_kl[n] = kl;
  }

  /// After position n is written: whoever completes a response scans it.
  __device__ void finish(int n) const {
    if (n == 0) write_empty_responses();
    const DeviceResponses& responses = scan.responses;
    const int64_t b = responses.find(n, thread_in_block() % kWarpSize);
    const int64_t begin = responses.begin(b), end = responses.end(b);
    if (n < begin || n >= end) return;  // cu_seqlens leave it out
    unsigned* const arrivals = rows.arrivals + (rows.slices > 1 ? responses.positions : 0) + b;
    if (arrives_last(arrivals, end - begin, PositionMemory<2>::get().is_last)) scan_response(scan, b);
  }

  /// Nobody arrives at a response without positions.
  __device__ void write_empty_responses() const {
    if (!scan.responses.cu_seqlens) return;
    for (int64_t b = thread_in_block(); b < scan.responses.count; b += kThreads)
      if (scan.responses.begin(b) >= scan.responses.end(b)) scan.out.effective_length[b] = 0;
  }
};

template <Stats kStats>
void run(const char* name, const ReliabilityArgs& args, const Queue& queue) {
  const int64_t positions = args.responses.positions;
  if (args.responses.count == 0) return;
  if (positions == 0) {
    const auto bytes = static_cast<size_t>(args.responses.count) * sizeof(int32_t);
    return require(cudaMemsetAsync(args.out.scan.effective_length, 0, bytes, queue.stream));
  }
  Reliability<kStats> reliability{
      make_rows(args.k, args.student, args.teacher),
      args.mask,
      args.token_ids,
      args.drift_rule,
      args.reward_weight,
      args.divergence,
      args.out,
      Scan(args.mask, view_of_flags(args.out.drift, positions), args.responses, args.scan_rule, args.out.scan)};
  const auto reward_bytes = positions * args.k * static_cast<int64_t>(sizeof(double));
  reliability.scan.reward_weight = args.weight;
  reliability.scan.unweighted = static_cast<double*>(queue.workspace(reward_bytes));
  reliability.scan.rewards = args.out.rewards;
  reliability.scan.k = static_cast<int>(args.k);
  run_at_positions(name, reliability, positions, queue, args.responses.count);
}

}  // namespace

template <>
void compute(const ReliabilityArgs& args, const Queue& queue) {
  run<Stats::kNone>(args.kName, args, queue);
}

template <>
void compute(const OpdScoresArgs& args, const Queue& queue) {
  const auto run_with = args.entropies    ? &run<Stats::kAll>
                        : args.divergence ? &run<Stats::kReverseKl>
                                          : &run<Stats::kNone>;
  run_with(args.kName, args, queue);
}

}  // namespace pruneopd::cuda
