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

/// Overwrites the gradient of each candidate: with the part of its own that it has in the sum, rounded once.
void write_candidates(const Row& row, const RowState& state, double scale, double total, Coefficient* candidates,
                      int64_t m, const GradientRow& out) {
  std::stable_sort(candidates, candidates + m, [](const auto& a, const auto& b) { return a.id < b.id; });
  for (int64_t j = 0; j < m;) {
    const int64_t id = candidates[j].id;
    double own = 0;
    for (; j < m && candidates[j].id == id; ++j) own += candidates[j].value;
    if (id < 0 || id >= out.vocab_size) continue;
    const double p =
        std::exp((logit_at(row, id) - static_cast<double>(state.reference)) / row.temperature) / state.mass;
    out.store(id, scale * (own - total * p));
  }
}

void pass_position(const LogprobsBackwardArgs& args, int64_t n) {
  const int64_t m = args.m;
  const double scale = real_at(args.scale, n) / args.student.temperature;
  Coefficient candidates[kMaxPolicyCandidates];
  double total = 0;
  bool all_zero = true;
  for (int64_t j = 0; j < m; ++j) {
    candidates[j] = {id_at(args.topk_ids, n, j), real_at(args.coefficients, n, j)};
    total += candidates[j].value;
    all_zero &= candidates[j].value == 0;
  }
  const GradientRow out(args.gradient, args.student, args.width, n);
  if (scale == 0 || all_zero) return out.clear_from(0);
  if (!(std::isfinite(total) && std::isfinite(scale))) return out.spoil();

  const Row row = row_at(args.student, n);
  const RowState state{static_cast<float>(real_at(args.state, n, 0)), static_cast<float>(real_at(args.state, n, 1))};
  row_kernels().scaled_softmax(row, args.student.vocab_size, state, -scale * total, out.data);
  write_candidates(row, state, scale, total, candidates, m, out);
  out.clear_from(out.vocab_size);
}

}  // namespace

template <>
void compute(const LogprobsBackwardArgs& args, const ParallelFor& parallel_for) {
  for_each_gradient(args.positions, parallel_for, [&](int64_t n) { pass_position(args, n); });
}

}  // namespace pruneopd
