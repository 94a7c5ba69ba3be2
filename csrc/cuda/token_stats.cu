// token_stats: a block takes a position, or a slice of one.
#include "../math/drift.h"
#include "position.cuh"

namespace pruneopd::cuda {
namespace {

constexpr int kSides = 2;  // 0 is the student's, 1 the teacher's

struct Candidates {
  int64_t* ids;
  float *logprobs, *partner_logprobs;
};

struct Params {
  Rows<2> rows;
  DeviceView mask, token_ids;
  Candidates candidates[kSides];
  float* overlap;
  float *lse[kSides], *entropy[kSides], *divergence[kSides], *token_logprob[kSides];
};

__device__ void write_masked(const Params& params, int n) {
  const int k = params.rows.k;
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const Candidates& out = params.candidates[side];
    for (int j = thread_in_block(); j < k; j += kThreads) {
      out.ids[params.rows.slot(n, j)] = j;
      out.logprobs[params.rows.slot(n, j)] = out.partner_logprobs[params.rows.slot(n, j)] = 0;
    }
    if (thread_in_block() == 0)
      params.lse[side][n] = params.entropy[side][n] = params.divergence[side][n] = params.token_logprob[side][n] = 0;
  }
  if (thread_in_block() == 0) params.overlap[n] = 0;
}

template <class T>
__device__ void write_position(const Params& params, int n) {
  const PositionMemory<2>& memory = PositionMemory<2>::get();
  const Rows<2>& rows = params.rows;
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
    const Candidates& out = params.candidates[side];
    const int j = thread_in_block();
    if (j >= k) continue;
    const int id = memory.id(side, j);
    out.ids[params.rows.slot(n, j)] = id;
    out.logprobs[params.rows.slot(n, j)] = logprob(side, memory.logit(side, j));
    out.partner_logprobs[params.rows.slot(n, j)] = logprob_of(1 - side, id);
    if (side == 0)
      for (int i = 0; i < k; ++i) hit |= memory.id(1, i) == id;
  }
  const int hits = __syncthreads_count(hit);
  if (thread_in_block() != 0) return;
  params.overlap[n] = static_cast<float>(overlap_of(memory.broken() ? 0 : hits, k));
  const int64_t token = params.token_ids ? params.token_ids.id(n) : -1;
  const bool exists = token >= 0 && token < rows.vocab_size;
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const RowSummary& summary = memory.summaries.rows[side];
    params.lse[side][n] = static_cast<float>(summary.lse);
    params.entropy[side][n] = static_cast<float>(summary.entropy);
    params.divergence[side][n] = static_cast<float>(memory.summaries.divergences[side]);
    params.token_logprob[side][n] = exists ? logprob_of(side, token) : NAN;
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

void compute(const TokenStatsArgs& args, const Queue& queue) {
  if (args.positions == 0) return;
  const Params params{
      .rows = make_rows(args.logits, args.k),
      .mask = DeviceView(args.mask),
      .token_ids = DeviceView(args.token_ids),
      .candidates = {{args.student_topk_ids, args.student_topk_logprobs, args.teacher_on_student_logprobs},
                     {args.teacher_topk_ids, args.teacher_topk_logprobs, args.student_on_teacher_logprobs}},
      .overlap = args.overlap,
      .lse = {args.student_lse, args.teacher_lse},
      .entropy = {args.student_entropy, args.teacher_entropy},
      .divergence = {args.reverse_kl, args.forward_kl},
      .token_logprob = {args.student_token_logprob, args.teacher_token_logprob}};
  with_logit_type(args.logits, [&]<class T>() {
    launch_over_logits<T>(&token_stats_kernel<T>, "token_stats", args.logits.vocab_size, args.positions,
                          /*responses=*/0, params, queue);
  });
}

}  // namespace pruneopd::cuda
