#include "../math/drift.h"
#include "operators/token_stats.h"
#include "position.cuh"

namespace pruneopd::cuda {
namespace {

struct TokenStats {
  static constexpr Stats kStats = Stats::kAll;
  static constexpr bool kSelects = true;

  Rows<2> rows;
  DeviceView mask, token_ids;
  TokenStatsArgs::Outputs out;

  __device__ bool reads(int n) const { return mask.flag(n); }

  __device__ void write_unread(int n) const {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      for (int j = thread_in_block(); j < rows.k; j += kThreads) {
        const int64_t slot = rows.slot(n, j);
        out.topk_ids[side][slot] = j;
        out.topk_logprobs[side][slot] = out.partner_logprobs[side][slot] = 0;
      }
      if (thread_in_block() == 0)
        out.lse[side][n] = out.entropy[side][n] = out.divergence[side][n] = out.token_logprob[side][n] = 0;
    }
    if (thread_in_block() == 0) out.overlap[n] = 0;
  }

  template <class T>
  __device__ void write(int n) const {
    PositionMemory<2>& memory = PositionMemory<2>::get();
    const int k = rows.k, student_size = memory.filled(0, k), teacher_size = memory.filled(1, k);
    const auto logprob = [&](int side, double logit) {
      return static_cast<float>(memory.summaries.rows[side].logprob(logit, rows.temperature(side)));
    };
    const auto logprob_of = [&](int side, int64_t id) {
      const auto row = make_row<T>(memory.logits[side], rows.type(side), rows.vocab_size);
      return logprob(side, row.logit(static_cast<int>(id)));
    };
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int j = thread_in_block();
      if (j >= k) continue;
      const int id = memory.id(side, j);
      const int64_t slot = rows.slot(n, j);
      out.topk_ids[side][slot] = id;
      out.topk_logprobs[side][slot] = logprob(side, memory.logit(side, j));
      out.partner_logprobs[side][slot] = logprob_of(1 - side, id);
    }
    const int j = thread_in_block();
    const bool asks = j < student_size;
    const int hits = __syncthreads_count(memory.is_in_row_1(asks, asks ? memory.id(0, j) : 0, teacher_size));
    if (thread_in_block() != 0) return;
    out.overlap[n] = memory.broken() ? 0 : static_cast<float>(overlap_of(hits, student_size, teacher_size));
    const int64_t token = token_ids ? token_ids.id(n) : -1;
    const bool exists = token >= 0 && token < rows.vocab_size;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const RowSummary& summary = memory.summaries.rows[side];
      out.lse[side][n] = static_cast<float>(summary.lse);
      out.entropy[side][n] = static_cast<float>(summary.entropy());
      out.divergence[side][n] = static_cast<float>(memory.summaries.divergences[side]);
      out.token_logprob[side][n] = exists ? logprob_of(side, token) : NAN;
    }
  }
};

}  // namespace

template <>
void compute(const TokenStatsArgs& args, const Queue& queue) {
  run_at_positions(args.kName,
                   TokenStats{make_rows(args.k, args.student, args.teacher), args.mask, args.token_ids, args.out},
                   args.positions, queue);
}

}  // namespace pruneopd::cuda
