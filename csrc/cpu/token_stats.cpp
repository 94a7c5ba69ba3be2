#include "operators/token_stats.h"

#include <algorithm>
#include <limits>

#include "position.h"

namespace pruneopd {
namespace {

void write_masked(const TokenStatsArgs::Outputs& out, int64_t n, int64_t k) {
  for (const int side : {0, 1}) {
    for (int64_t j = 0; j < k; ++j) out.topk_ids[side][n * k + j] = j;
    for (float* of_candidates : {out.topk_logprobs[side], out.partner_logprobs[side]})
      std::fill_n(of_candidates + n * k, k, 0.0f);
    for (float* of_positions : {out.lse[side], out.entropy[side], out.divergence[side], out.token_logprob[side]})
      of_positions[n] = 0;
  }
  out.overlap[n] = 0;
}

void pass_position(const TokenStatsArgs& args, int64_t n, RowScratch& scratch) {
  const TokenStatsArgs::Outputs& out = args.out;
  const int64_t k = args.k, vocab_size = args.student.vocab_size;
  if (!load_flag(args.mask, n)) return write_masked(out, n, k);
  const Row rows[2] = {row_at(args.student, n), row_at(args.teacher, n)};
  const RowPairSummary pair = row_kernels().row_pair(rows[0], rows[1], vocab_size, k, Sums::kAll, scratch);
  const RowSummary* const summaries[2] = {&pair.student, &pair.teacher};
  const Candidate* const candidates[2] = {scratch.student_candidates, scratch.teacher_candidates};
  const int64_t token = args.token_ids ? id_at(args.token_ids, n) : -1;
  const auto logprob = [&](int side, int64_t id) {
    return static_cast<float>(logprob_at(rows[side], *summaries[side], id));
  };
  for (const int side : {0, 1}) {
    for (int64_t j = 0; j < k; ++j) {
      const Candidate candidate = candidates[side][j];
      const int64_t id = candidate_id(candidate), slot = n * k + j;
      out.topk_ids[side][slot] = id;
      out.topk_logprobs[side][slot] =
          static_cast<float>(summaries[side]->logprob(candidate_logit(candidate), rows[side].temperature));
      out.partner_logprobs[side][slot] = logprob(1 - side, id);
    }
    out.lse[side][n] = static_cast<float>(summaries[side]->lse);
    out.entropy[side][n] = static_cast<float>(summaries[side]->entropy());
    out.divergence[side][n] = static_cast<float>(side == 0 ? pair.reverse_kl : pair.forward_kl);
    out.token_logprob[side][n] =
        token >= 0 && token < vocab_size ? logprob(side, token) : std::numeric_limits<float>::quiet_NaN();
  }
  const int filled[2] = {count_filled(candidates[0], k), count_filled(candidates[1], k)};
  out.overlap[n] = pair.broken() ? 0 : static_cast<float>(overlap_of(scratch, filled[0], filled[1]));
}

}  // namespace

template <>
void compute(const TokenStatsArgs& args, const ParallelFor& parallel_for) {
  for_each_position(args.positions, args.student.vocab_size, args.k, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch); });
}

}  // namespace pruneopd
