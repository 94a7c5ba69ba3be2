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
  const int64_t token = load_id(args.token_ids, args.token_ids.at.offset(n));
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
  int64_t* topk_ids = args.topk_ids + n * k;
  float* rewards = args.rewards + n * k;
  if (!load_flag(args.mask, n)) {
    args.overlap[n] = 0;
    args.drift[n] = false;
    for (int64_t j = 0; j < k; ++j) topk_ids[j] = j;
    std::fill_n(rewards, k, 0.0f);
    return;
  }
  const Row student = row_at(args.logits.student, args.logits.student_temperature, n);
  const Row teacher = row_at(args.logits.teacher, args.logits.teacher_temperature, n);
  const RowPairSummary summary = row_kernels().row_pair(student, teacher, args.logits.vocab_size, k, false, scratch);
  for (int64_t j = 0; j < k; ++j) topk_ids[j] = candidate_id(scratch.student_candidates[j]);

  const int common = summary.broken() ? 0 : count_common_candidates(scratch, k);
  args.overlap[n] = static_cast<float>(overlap_of(common, static_cast<int>(k)));
  args.drift[n] = summary.broken() || (args.drift_rule.metric == Metric::kOverlap
                                           ? drifts_by_overlap(common, static_cast<int>(k), args.drift_rule.threshold)
                                           : rejected(args, teacher, summary.teacher, scratch, n));
  if (summary.broken())
    std::fill_n(rewards, k, std::numeric_limits<float>::quiet_NaN());
  else
    write_rewards(args, student, teacher, summary, scratch, rewards);
}

}  // namespace

void compute(const ReliabilityArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.responses.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    RowMemory memory(args.logits.vocab_size, args.k);
    for (int64_t n = begin; n < end; ++n) pass_position(args, n, memory.scratch());
  });
  scan_responses(
      args.responses, args.mask, args.scan_rule, args.scan, parallel_for,
      [&](int64_t n, int64_t count, bool* drift) { std::copy_n(args.drift + n, count, drift); },
      [&](int64_t n, int64_t count) {
        for (int64_t i = 0; i < count * args.k; ++i) {
          float& reward = args.rewards[n * args.k + i];
          reward = weighted_reward(args.scan.weight[n + i / args.k], reward);
        }
      });
}

}  // namespace pruneopd
