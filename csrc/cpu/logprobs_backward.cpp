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
  const View &coefficients = args.coefficients, &ids = args.topk_ids;
  const int64_t first = coefficients.at.offset(n), first_id = ids.at.offset(n), m = args.m;
  const double scale = load_real(args.scale, args.scale.at.offset(n)) / args.student.temperature;
  Coefficient candidates[kMaxPolicyCandidates];
  double total = 0;
  bool all_zero = true;
  for (int64_t j = 0; j < m; ++j) {
    candidates[j] = {load_id(ids, first_id + j * ids.step), load_real(coefficients, first + j * coefficients.step)};
    total += candidates[j].value;
    all_zero &= candidates[j].value == 0;
  }
  const GradientRow out(args.gradient, args.student.rows.type, args.student.vocab_size, args.width, n);
  if (scale == 0 || all_zero) return out.clear_from(0);
  if (!(std::isfinite(total) && std::isfinite(scale))) return out.spoil();

  const Row row = row_at(args.student.rows, args.student.temperature, n);
  const int64_t at = args.state.at.offset(n);
  const RowState state(static_cast<float>(load_real(args.state, at)),
                       static_cast<float>(load_real(args.state, at + args.state.step)));
  row_kernels().scaled_softmax(row, args.student.vocab_size, state, -scale * total, out.data);
  write_candidates(row, state, scale, total, candidates, m, out);
  out.clear_from(out.vocab_size);
}

}  // namespace

void compute(const LogprobsBackwardArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.positions, 1, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    for (int64_t n = begin; n < end; ++n) pass_position(args, n);
  });
}

}  // namespace pruneopd
