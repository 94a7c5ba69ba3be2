// Random cases of reliability_from_topk and reliability_from_drift, and room for what the operators give.
#pragma once

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "harness.h"
#include "naive.h"
#include "tensors.h"

struct Scan {
  std::vector<int32_t> drift_count, effective_length;
  std::vector<float> reliability, weight, overlap;
  std::unique_ptr<bool[]> drift;

  explicit Scan(const Responses& responses) {
    const size_t positions = static_cast<size_t>(responses.positions);
    drift_count.assign(positions, -7);
    effective_length.assign(static_cast<size_t>(responses.count), -7);
    for (std::vector<float>* floats : {&reliability, &weight, &overlap}) floats->assign(positions, -7);
    drift = std::make_unique<bool[]>(positions);
  }
  ScanOutputs outputs() { return {drift_count.data(), reliability.data(), weight.data(), effective_length.data()}; }

  void check(const std::string& where, const Scan& want) const {
    check_equal(where, "drift_count", drift_count, want.drift_count);
    check_equal(where, "reliability", reliability, want.reliability);
    check_equal(where, "weight", weight, want.weight);
    check_equal(where, "effective_length", effective_length, want.effective_length);
    check_equal(where, "overlap", overlap, want.overlap);
    for (size_t n = 0; n < weight.size(); ++n) CHECK(drift[n] == want.drift[n]);
  }
};

/// Padded or packed with empty responses, with a carried count or without.
struct Layout {
  int64_t count, length;
  std::vector<int32_t> starts, counts;
  bool packed, carried;
  double w_drop, w_base, eps;

  int64_t positions() const { return count * length; }
  Shape shape() const { return packed ? Shape{positions()} : Shape{count, length}; }
  Responses responses() const { return {count, positions(), packed ? view_of(starts) : View{}}; }
  ScanRule rule() const { return {w_drop, w_base, eps, carried ? view_of(counts) : View{}}; }
};

inline Layout make_layout(Random& random, int64_t longest = 6) {
  Layout layout;
  layout.count = random.integer(1, 4);
  layout.length = random.integer(0, longest);
  layout.starts = {0};
  for (int64_t b = 1; b < layout.count; ++b)
    layout.starts.push_back(static_cast<int32_t>(random.integer(layout.starts.back(), layout.positions())));
  layout.starts.push_back(static_cast<int32_t>(layout.positions()));
  for (int64_t b = 0; b < layout.count; ++b) layout.counts.push_back(static_cast<int32_t>(random.integer(0, 90)));
  layout.w_drop = random.pick<double>({0, .01, .3, 5});
  layout.w_base = random.pick<double>({0, .5});
  layout.eps = random.pick<double>({0, 1e-8, .5});
  layout.packed = random.chance(.5);
  layout.carried = random.chance(.5);
  return layout;
}

struct DriftCase {
  Layout layout;
  Tensor drift, mask;
  bool masked;

  ReliabilityFromDriftArgs args(Scan& outputs) const {
    return {drift.view, masked ? mask.view : View{}, layout.responses(), layout.rule(), outputs.outputs()};
  }
};

inline DriftCase make_drift_case(Random& random, int64_t longest = 6) {
  const Layout layout = make_layout(random, longest);
  const Scalar mask_type = static_cast<Scalar>(random.integer(0, 9));
  Tensor drift = values(random, Scalar::kBool, layout.shape(), false, [&] { return random.chance(.4); });
  Tensor mask = values(random, mask_type, layout.shape(), false, [&] { return random.chance(.7); });
  return {layout, drift, mask, random.chance(.5)};
}

struct TopkCase {
  Layout layout;
  int64_t k;
  Tensor student, teacher, logprobs, token_ids, mask;
  bool masked;
  DriftRule rule;

  ReliabilityFromTopkArgs args(Scan& outputs) const {
    ReliabilityFromTopkArgs args;
    args.student_topk_ids = student.view;
    args.teacher_topk_ids = teacher.view;
    if (masked) args.mask = mask.view;
    args.drift_rule = rule;
    if (rule.metric == Metric::kTopP) {
      args.teacher_topk_logprobs = logprobs.view;
      args.token_ids = token_ids.view;
    }
    args.responses = layout.responses();
    args.scan_rule = layout.rule();
    args.k = k;
    args.overlap = outputs.overlap.data();
    args.drift = outputs.drift.get();
    args.scan = outputs.outputs();
    return args;
  }
};

inline TopkCase make_topk_case(Random& random, int64_t longest = 6) {
  const Layout layout = make_layout(random, longest);
  const int64_t k = random.pick<int64_t>({1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 100, 256});
  const Shape shape = layout.shape();
  Shape rows = shape;
  rows.push_back(k);
  // Few ids, so that some are common; padding; and ids that differ only beyond 32 bits.
  const auto id = [&] {
    const int64_t small = random.integer(random.chance(.2) ? -2 : 0, 3 * k);
    return static_cast<double>(random.chance(.1) ? small + (int64_t{1} << 32) : small);
  };
  const auto small_id = [&] { return static_cast<double>(random.integer(-1, 2 * k)); };
  const bool wide = random.chance(.7);
  const auto ids = [&] {
    return wide ? values(random, Scalar::kI64, rows, true, id) : values(random, Scalar::kI32, rows, true, small_id);
  };
  const Tensor student = ids(), teacher = ids();
  const Tensor logprobs =
      values(random, random.pick<Scalar>({Scalar::kF32, Scalar::kF64, Scalar::kBF16, Scalar::kF16}), rows, true, [&] {
        return random.chance(.02) ? naive::kNaN : random.chance(.1) ? -naive::kInf : -random.integer(1, 64) / 8.0;
      });
  const Tensor token_ids = values(random, random.pick<Scalar>({Scalar::kI32, Scalar::kI64}), shape, false, small_id);
  const Tensor mask = values(random, Scalar::kI16, shape, false, [&] { return random.chance(.7) ? 256 : 0; });
  const DriftRule rule{random.pick<Metric>({Metric::kOverlap, Metric::kTopP}), random.pick<double>({.2, .5, .7, 1}),
                       random.pick<double>({.3, .9})};
  return {layout, k, student, teacher, logprobs, token_ids, mask, random.chance(.5), rule};
}
