#include "operators/row_stats.h"
#include "position.cuh"

namespace pruneopd::cuda {
namespace {

template <Stats kSums, bool kHasCandidates>
struct RowStats {
  static constexpr Stats kStats = kSums;
  static constexpr bool kSelects = kHasCandidates;

  Rows<1> rows;
  DeviceView mask, token_ids;
  int m;
  RowStatsArgs::Outputs out;

  __device__ bool reads(int n) const { return mask.flag(n); }

  __device__ void write_unread(int n) const {
    for (int j = thread_in_block(); j < rows.k; j += kThreads) out.topk_ids[rows.slot(n, j)] = j;
    for (int j = thread_in_block(); j < m; j += kThreads) out.logprobs[int64_t{n} * m + j] = 0;
    if (thread_in_block() != 0) return;
    out.entropy[n] = out.lse[n] = 0;
    out.filled[n] = 0;
    state_at<RowState>(out.state, n) = {};
  }

  template <class T>
  __device__ void write(int n) const {
    const PositionMemory<1>& memory = PositionMemory<1>::get();
    const auto row = make_row<T>(memory.logits[0], rows.logits[0].type, rows.vocab_size);
#pragma unroll 1
    for (int j = thread_in_block(); j < m; j += kThreads) {
      const int64_t id = token_ids.id(n, j);
      double logprob = id < 0 ? 0 : NAN;
      if (id >= 0 && id < rows.vocab_size)
        logprob = memory.summaries.rows[0].logprob(row.logit(static_cast<int>(id)), rows.temperatures[0]);
      out.logprobs[int64_t{n} * m + j] = logprob;
    }
    const int filled = kSelects ? memory.filled(0, rows.k) : 0;
    if constexpr (kSelects)
      for (int j = thread_in_block(); j < rows.k; j += kThreads) out.topk_ids[rows.slot(n, j)] = memory.id(0, j);
    if (thread_in_block() != 0) return;
    const RowSummary summary = memory.summary(rows, 0);
    RowState state = RowState::of(summary);
    if (kStats == Stats::kNone && !summary.broken) state.mean = 0;
    state_at<RowState>(out.state, n) = state;
    out.entropy[n] = kStats == Stats::kNone ? 0 : static_cast<float>(summary.entropy());
    out.lse[n] = static_cast<float>(summary.lse);
    out.filled[n] = filled;
  }
};

template <Stats kStats, bool kSelects>
void run(const RowStatsArgs& args, const Queue& queue) {
  const RowStats<kStats, kSelects> stats{make_rows(args.k, args.logits), args.mask, args.token_ids,
                                         static_cast<int>(args.m), args.out};
  run_at_positions(args.kName, stats, args.positions, queue);
}

}  // namespace

template <>
void compute(const RowStatsArgs& args, const Queue& queue) {
  if (args.entropy) return args.k ? run<Stats::kAll, true>(args, queue) : run<Stats::kAll, false>(args, queue);
  return args.k ? run<Stats::kNone, true>(args, queue) : run<Stats::kNone, false>(args, queue);
}

}  // namespace pruneopd::cuda
