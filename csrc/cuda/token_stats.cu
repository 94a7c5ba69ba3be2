// token_stats: a block takes a position, or a slice of one.
#include "../math/drift.h"
#include "operators/token_stats.h"
#include "position.cuh"

namespace pruneopd::cuda {
namespace {

constexpr int kSides = 2;  // 0 is the student's, 1 the teacher's

struct Params {
  Rows<2> rows;
  DeviceView mask, token_ids;
  TokenStatsArgs::Outputs out;
};

__device__ void write_masked(const Params& params, int n) {
  const TokenStatsArgs::Outputs& out = params.out;
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    for (int j = thread_in_block(); j < params.rows.k; j += kThreads) {
      const int64_t slot = params.rows.slot(n, j);
      out.topk_ids[side][slot] = j;
      out.topk_logprobs[side][slot] = out.partner_logprobs[side][slot] = 0;
    }
    if (thread_in_block() == 0)
      out.lse[side][n] = out.entropy[side][n] = out.divergence[side][n] = out.token_logprob[side][n] = 0;
  }
  if (thread_in_block() == 0) out.overlap[n] = 0;
}

template <class T>
__device__ void write_position(const Params& params, int n) {
  const PositionMemory<2>& memory = PositionMemory<2>::get();
  const Rows<2>& rows = params.rows;
  const TokenStatsArgs::Outputs& out = params.out;
  const int k = rows.k;
  const auto logprob = [&](int side, double logit) {
    return static_cast<float>(memory.summaries.rows[side].logprob(logit, rows.temperature(side)));
  };
  const auto logprob_of = [&](int side, int64_t id) {
    const auto row = make_row<T>(memory.logits[side], rows.type(side), rows.vocab_size);
    return logprob(side, row.logit(static_cast<int>(id)));
  };
  bool hit = false;
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const int j = thread_in_block();
    if (j >= k) continue;
    const int id = memory.id(side, j);
    const int64_t slot = rows.slot(n, j);
    out.topk_ids[side][slot] = id;
    out.topk_logprobs[side][slot] = logprob(side, memory.logit(side, j));
    out.partner_logprobs[side][slot] = logprob_of(1 - side, id);
    if (side == 0)
      for (int i = 0; i < k; ++i) hit |= memory.id(1, i) == id;
  }
  const int hits = __syncthreads_count(hit);
  if (thread_in_block() != 0) return;
  out.overlap[n] = static_cast<float>(overlap_of(memory.broken() ? 0 : hits, k));
  const int64_t token = params.token_ids ? params.token_ids.id(n) : -1;
  const bool exists = token >= 0 && token < rows.vocab_size;
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const RowSummary& summary = memory.summaries.rows[side];
    out.lse[side][n] = static_cast<float>(summary.lse);
    out.entropy[side][n] = static_cast<float>(summary.entropy);
    out.divergence[side][n] = static_cast<float>(memory.summaries.divergences[side]);
    out.token_logprob[side][n] = exists ? logprob_of(side, token) : NAN;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) token_stats_kernel(Params params) {
  const int n = params.rows.position();
  if (!params.mask.flag(n)) {
    if (params.rows.slice() == 0) write_masked(params, n);
  } else if (pass_position<T, Stats::kAll, true>(params.rows, n)) {
    write_position<T>(params, PositionMemory<2>::get().position);
  }
}

}  // namespace

template <>
void compute(const TokenStatsArgs& args, const Queue& queue) {
  const Params params{make_rows(args.k, args.student, args.teacher), args.mask, args.token_ids, args.out};
  with_logit_type(args.student, args.teacher, [&]<class T>() {
    launch_over_logits<T>(&token_stats_kernel<T>, args.kName, args.positions, /*responses=*/0, params, queue);
  });
}

}  // namespace pruneopd::cuda
