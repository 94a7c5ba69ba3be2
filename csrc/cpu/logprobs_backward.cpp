#include "operators/logprobs_backward.h"

#include <algorithm>
#include <cmath>

#include "gradient_row.h"
#include "position.h"

namespace pruneopd {
namespace {

struct Coefficient {
  int64_t id;
  double value;
};

/// Overwrites the gradient of each candidate, which also has a part of its own, rounded once.
void write_candidates(const Row& row, const RowState& state, double total, double entropy, Coefficient* candidates,
                      int64_t m, const GradientRow& out) {
  std::stable_sort(candidates, candidates + m, [](const auto& a, const auto& b) { return a.id < b.id; });
  for (int64_t j = 0; j < m;) {
    const int64_t id = candidates[j].id;
    double own = 0;
    for (; j < m && candidates[j].id == id; ++j) own += candidates[j].value;
    if (id < 0 || id >= out.vocab_size) continue;
    const double of_all = softmax_gradient(logit_at(row, id), state, row.temperature, total, entropy);
    out.store(id, (own - of_all) / row.temperature);
  }
}

void pass_position(const LogprobsBackwardArgs& args, int64_t n) {
  const int64_t m = args.m;
  const double entropy = args.entropy_coefficient ? real_at(args.entropy_coefficient, n) : 0;
  Coefficient candidates[kMaxTokenIds];
  double total = 0;
  bool all_zero = entropy == 0;
  for (int64_t j = 0; j < m; ++j) {
    candidates[j] = {id_at(args.token_ids, n, j), real_at(args.coefficients, n, j)};
    total += candidates[j].value;
    all_zero &= candidates[j].value == 0;
  }
  const GradientRow out(args.gradient, args.logits, args.width, n);
  if (all_zero) return out.clear_from(0);
  const RowState state{real_at(args.state, n, 0), real_at(args.state, n, 1), real_at(args.state, n, 2)};
  for (const double number : {total, entropy, state.reference, state.mass, state.mean})
    if (!std::isfinite(number)) return out.spoil();

  const Row row = row_at(args.logits, n);
  row_kernels().softmax_gradient(row, out.vocab_size, state, -total / row.temperature, -entropy / row.temperature,
                                 out.data);
  write_candidates(row, state, total, entropy, candidates, m, out);
  out.clear_from(out.vocab_size);
}

}  // namespace

template <>
void compute(const LogprobsBackwardArgs& args, const ParallelFor& parallel_for) {
  for_each_gradient(args.positions, parallel_for, [&](int64_t n) { pass_position(args, n); });
}

}  // namespace pruneopd
