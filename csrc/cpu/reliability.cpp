#include "operators/reliability.h"

#include <algorithm>
#include <memory>

#include "../math/reward.h"
#include "position.h"
#include "responses.h"

namespace pruneopd {
namespace {

/// Whether the token of position n lies in the teacher's nucleus. An id that does not exist does not.
bool accepts(const ReliabilityArgs& args, const Row& teacher, const RowSummary& summary, const Candidate* candidates,
             int size, int64_t n) {
  const int64_t token = id_at(args.token_ids, n);
  Nucleus nucleus(args.drift_rule.top_p);
  for (int j = 0; j < size && !nucleus.closed; ++j)
    nucleus.add(summary.logprob(candidate_logit(candidates[j]), teacher.temperature),
                candidate_id(candidates[j]) == token);
  return nucleus.accepts();
}

/// r of position n (eq. 11 without L), for its student candidates that are filled, `size` of them.
void write_rewards(const ReliabilityArgs& args, const Row& student, const Row& teacher, const RowPairSummary& summary,
                   const RowScratch& scratch, int size, double* rewards) {
  double p[256], q[256];
  for (int j = 0; j < size; ++j) {
    const Candidate candidate = scratch.student_candidates[j];
    p[j] = summary.student.logprob(candidate_logit(candidate), student.temperature);
    q[j] = logprob_at(teacher, summary.teacher, candidate_id(candidate));
  }
  if (args.reward_weight == RewardWeight::kNone) {
    for (int j = 0; j < size; ++j) rewards[j] = reward_of(p[j], q[j], 1.0 / size);
    return;
  }
  const double* of = args.reward_weight == RewardWeight::kStudent ? p : q;
  const double max = *std::max_element(of, of + size);
  if (max == -std::numeric_limits<double>::infinity()) return;  // no mass to renormalise
  double mass = 0;
  for (int j = 0; j < size; ++j) mass += std::exp(of[j] - max);
  for (int j = 0; j < size; ++j) rewards[j] = reward_of(p[j], q[j], std::exp(of[j] - max) / mass);
}

/// What opd_scores has more; `summary` is null where the position is masked.
void write_scores(const ReliabilityArgs& args, int64_t n, const RowPairSummary* summary, bool accepted) {
  const ReliabilityArgs::Outputs& out = args.out;
  if (!out.accepted) return;
  const RowPairSummary none, &pair = summary ? *summary : none;
  out.accepted[n] = accepted;
  out.student_entropy[n] = args.entropies ? static_cast<float>(pair.student.entropy()) : 0;
  out.teacher_entropy[n] = args.entropies ? static_cast<float>(pair.teacher.entropy()) : 0;
  out.reverse_kl[n] = pair.reverse_kl;
  DivergenceState& state = state_at<DivergenceState>(out.state, n);
  state = {};
  if (!summary) return;
  state = DivergenceState::of(pair.student, pair.teacher, pair.reverse_kl, pair.peak_excess);
  if (!args.divergence) state = {state.reference, state.mass, 0, 0, 0};
}

void pass_position(const ReliabilityArgs& args, int64_t n, RowScratch& scratch, double* rewards) {
  const int64_t k = args.k;
  int64_t* topk_ids = args.out.topk_ids + n * k;
  if (!load_flag(args.mask, n)) {
    args.out.overlap[n] = 0;
    args.out.drift[n] = false;
    for (int64_t j = 0; j < k; ++j) topk_ids[j] = j;
    std::fill_n(rewards, k, 0.0);
    return write_scores(args, n, nullptr, false);
  }
  const Row student = row_at(args.student, n);
  const Row teacher = row_at(args.teacher, n);
  const Sums sums = args.entropies ? Sums::kAll : args.divergence ? Sums::kDivergence : Sums::kMass;
  const RowPairSummary summary = row_kernels().row_pair(student, teacher, args.student.vocab_size, k, sums, scratch);
  for (int64_t j = 0; j < k; ++j) topk_ids[j] = candidate_id(scratch.student_candidates[j]);

  const int student_size = count_filled(scratch.student_candidates, k);
  const int teacher_size = count_filled(scratch.teacher_candidates, k);
  const double overlap = summary.broken() ? 0 : overlap_of(scratch, student_size, teacher_size);
  const bool by_overlap = args.drift_rule.metric == Metric::kOverlap, wants_accepted = args.out.accepted || !by_overlap;
  const bool accepted = wants_accepted && args.token_ids && !summary.broken() &&
                        accepts(args, teacher, summary.teacher, scratch.teacher_candidates, teacher_size, n);
  args.out.overlap[n] = static_cast<float>(overlap);
  args.out.drift[n] = summary.broken() || (by_overlap ? overlap < args.drift_rule.threshold : !accepted);
  std::fill_n(rewards, k, 0.0);
  if (summary.broken())  // a broken row may have no candidates
    std::fill_n(rewards, summary.student.broken ? k : student_size, std::numeric_limits<double>::quiet_NaN());
  else
    write_rewards(args, student, teacher, summary, scratch, student_size, rewards);
  write_scores(args, n, &summary, accepted);
}

}  // namespace

template <>
void compute(const ReliabilityArgs& args, const ParallelFor& parallel_for) {
  const int64_t positions = args.responses.positions, k = args.k;
  // In float64 until their weights are known, which come from the positions before.
  const auto rewards = std::make_unique_for_overwrite<double[]>(static_cast<size_t>(positions * k));
  for_each_position(positions, args.student.vocab_size, k, parallel_for,
                    [&](int64_t n, RowScratch& scratch) { pass_position(args, n, scratch, rewards.get() + n * k); });
  const auto weight_of = [&](int64_t n) -> double {
    if (!args.weight) return args.out.scan.weight[n];
    return load_flag(args.mask, n) ? real_at(args.weight, n) : 0;
  };
  scan_responses(args.responses, args.mask, view_of_flags(args.out.drift, positions), args.scan_rule, args.out.scan,
                 parallel_for, [&](int64_t first, int64_t count) {
                   for (int64_t n = first; n < first + count; ++n) {
                     const double weight = weight_of(n);
                     for (int64_t slot = n * k; slot < (n + 1) * k; ++slot)
                       args.out.rewards[slot] = weighted_reward(weight, rewards[slot]);
                   }
                 });
}

template <>
void compute(const OpdScoresArgs& args, const ParallelFor& parallel_for) {
  compute<ReliabilityArgs>(args, parallel_for);
}

}  // namespace pruneopd
