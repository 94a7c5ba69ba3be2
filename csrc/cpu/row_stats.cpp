#include "operators/row_stats.h"

#include <algorithm>
#include <limits>

#include "position.h"

namespace pruneopd {
namespace {

void write_masked(const RowStatsArgs& args, int64_t n) {
  const RowStatsArgs::Outputs& out = args.out;
  std::fill_n(out.logprobs + n * args.m, args.m, 0.0);
  for (int64_t j = 0; j < args.k; ++j) out.topk_ids[n * args.k + j] = j;
  out.entropy[n] = out.lse[n] = 0;
  out.filled[n] = 0;
  state_at<RowState>(out.state, n) = {};
}

void pass_position(const RowStatsArgs& args, int64_t n, RowScratch& scratch) {
  const RowStatsArgs::Outputs& out = args.out;
  const int64_t k = args.k, vocab_size = args.logits.vocab_size;
  if (!load_flag(args.mask, n)) return write_masked(args, n);
  const Row row = row_at(args.logits, n);
  const RowSummary summary = row_kernels().row(row, vocab_size, k, args.entropy, scratch);
  for (int64_t j = 0; j < args.m; ++j) {
    const int64_t id = id_at(args.token_ids, n, j);
    out.logprobs[n * args.m + j] = id < 0            ? 0
                                   : id < vocab_size ? logprob_at(row, summary, id)
                                                     : std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t j = 0; j < k; ++j) out.topk_ids[n * k + j] = candidate_id(scratch.student_candidates[j]);
  out.entropy[n] = args.entropy ? static_cast<float>(summary.entropy()) : 0;
  out.lse[n] = static_cast<float>(summary.lse);
  out.filled[n] = count_filled(scratch.student_candidates, k);
  state_at<RowState>(out.state, n) = RowState::of(summary);
}

}  // namespace

template <>
void compute(const RowStatsArgs& args, const ParallelFor& parallel_for) {
  for_each_position(args.positions, args.logits.vocab_size, args.k, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch); });
}

}  // namespace pruneopd
