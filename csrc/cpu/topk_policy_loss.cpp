#include <algorithm>
#include <cmath>
#include <limits>

#include "position.h"

namespace pruneopd {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Candidate j of position n.
struct PolicyCandidate {
  int64_t id;
  double advantage;

  PolicyCandidate(const TopkPolicyLossArgs& args, int64_t n, int64_t j)
      : id(load_id(args.topk_ids, args.topk_ids.at.offset(n) + j * args.topk_ids.step)),
        advantage(load_real(args.advantages, args.advantages.at.offset(n) + j * args.advantages.step)) {}

  bool counts() const { return id >= 0 && advantage != 0; }
};

bool has_candidates(const TopkPolicyLossArgs& args, int64_t n) {
  for (int64_t j = 0; j < args.m; ++j)
    if (PolicyCandidate(args, n, j).counts()) return true;
  return false;
}

void pass_position(const TopkPolicyLossArgs& args, int64_t n, RowScratch& scratch) {
  float* const coefficients = args.coefficients + n * args.m;
  float* const state = args.state + n * kRowState;
  if (!load_flag(args.mask, n) || !has_candidates(args, n)) {
    args.loss[n] = 0;
    std::fill_n(coefficients, args.m, 0.0f);
    std::fill_n(state, kRowState, 0.0f);
    return;
  }
  const Row row = row_at(args.student.rows, args.student.temperature, n);
  const RowSummary summary = row_kernels().row(row, args.student.vocab_size, /*k=*/0, scratch);
  const PolicyClips clips{args.clip_low, args.clip_high, args.clip_dual};
  double loss = 0;
  for (int64_t j = 0; j < args.m; ++j) {
    const PolicyCandidate candidate(args, n, j);
    LossTerm term;
    if (candidate.counts()) {
      const double logprob = candidate.id < args.student.vocab_size ? logprob_at(row, summary, candidate.id) : kNaN;
      const View& given = args.old_logprobs;
      const double old = given ? load_real(given, given.at.offset(n) + j * given.step) : logprob;
      term = policy_term(logprob, old, candidate.advantage, clips);
    }
    loss += term.value;
    coefficients[j] = static_cast<float>(term.derivative);
  }
  args.loss[n] = static_cast<float>(loss);
  if (!std::isfinite(args.loss[n])) std::fill_n(coefficients, args.m, kNaN);
  const RowState saved(summary);
  state[0] = saved.reference;
  state[1] = saved.mass;
}

}  // namespace

void compute(const TopkPolicyLossArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    RowMemory memory(args.student.vocab_size, /*k=*/1);
    for (int64_t n = begin; n < end; ++n) pass_position(args, n, memory.scratch());
  });
}

}  // namespace pruneopd
