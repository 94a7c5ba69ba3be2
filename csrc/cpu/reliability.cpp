#include "operators/reliability.h"

#include <algorithm>

#include "../math/drift.h"
#include "../math/reward.h"
#include "position.h"
#include "responses.h"

namespace pruneopd {
namespace {

/// Whether the teacher's nucleus rejects the token of position n. An id that does not exist is not accepted.
bool rejected(const ReliabilityArgs& args, const Row& teacher, const RowSummary& summary, const RowScratch& scratch,
              int64_t n) {
  const int64_t token = id_at(args.token_ids, n);
  Nucleus nucleus(args.drift_rule.top_p);
  for (int64_t j = 0; j < args.k && !nucleus.closed; ++j) {
    const Candidate candidate = scratch.teacher_candidates[j];
    nucleus.add(summary.logprob(candidate_logit(candidate), teacher.temperature), candidate_id(candidate) == token);
  }
  return !nucleus.accepts();
}

/// r of position n (eq. 11 without L), for its k student candidates.
void write_rewards(const ReliabilityArgs& args, const Row& student, const Row& teacher, const RowPairSummary& summary,
                   const RowScratch& scratch, float* rewards) {
  const int64_t k = args.k;
  double p[256], q[256];
  for (int64_t j = 0; j < k; ++j) {
    const Candidate candidate = scratch.student_candidates[j];
    p[j] = summary.student.logprob(candidate_logit(candidate), student.temperature);
    q[j] = logprob_at(teacher, summary.teacher, candidate_id(candidate));
  }
  if (args.reward_weight == RewardWeight::kNone) {
    for (int64_t j = 0; j < k; ++j)
      rewards[j] = static_cast<float>(reward_of(p[j], q[j], 1.0 / static_cast<double>(k)));
    return;
  }
  const double* of = args.reward_weight == RewardWeight::kStudent ? p : q;
  const double max = *std::max_element(of, of + k);
  double mass = 0;
  for (int64_t j = 0; j < k; ++j) mass += std::exp(of[j] - max);
  const bool no_mass = max == -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < k; ++j)
    rewards[j] = no_mass ? 0 : static_cast<float>(reward_of(p[j], q[j], std::exp(of[j] - max) / mass));
}

void pass_position(const ReliabilityArgs& args, int64_t n, RowScratch& scratch) {
  const int64_t k = args.k;
  int64_t* topk_ids = args.out.topk_ids + n * k;
  float* rewards = args.out.rewards + n * k;
  if (!load_flag(args.mask, n)) {
    args.out.overlap[n] = 0;
    args.out.drift[n] = false;
    for (int64_t j = 0; j < k; ++j) topk_ids[j] = j;
    std::fill_n(rewards, k, 0.0f);
    return;
  }
  const Row student = row_at(args.student, n);
  const Row teacher = row_at(args.teacher, n);
  const RowPairSummary summary = row_kernels().row_pair(student, teacher, args.student.vocab_size, k, false, scratch);
  for (int64_t j = 0; j < k; ++j) topk_ids[j] = candidate_id(scratch.student_candidates[j]);

  const int common = summary.broken() ? 0 : count_common_candidates(scratch, k);
  args.out.overlap[n] = static_cast<float>(overlap_of(common, static_cast<int>(k)));
  args.out.drift[n] =
      summary.broken() || (args.drift_rule.metric == Metric::kOverlap
                               ? drifts_by_overlap(common, static_cast<int>(k), args.drift_rule.threshold)
                               : rejected(args, teacher, summary.teacher, scratch, n));
  if (summary.broken())
    std::fill_n(rewards, k, std::numeric_limits<float>::quiet_NaN());
  else
    write_rewards(args, student, teacher, summary, scratch, rewards);
}

}  // namespace

template <>
void compute(const ReliabilityArgs& args, const ParallelFor& parallel_for) {
  for_each_position(args.responses.positions, args.student.vocab_size, args.k, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch); });
  scan_responses(args.responses, args.mask, view_of_flags(args.out.drift, args.responses.positions), args.scan_rule,
                 args.out.scan, parallel_for, [&](int64_t n, int64_t count) {
                   for (int64_t slot = n * args.k; slot < (n + count) * args.k; ++slot)
                     args.out.rewards[slot] =
                         weighted_reward(args.out.scan.weight[slot / args.k], args.out.rewards[slot]);
                 });
}

}  // namespace pruneopd
