// reliability_from_topk and reliability_from_drift against the naive operators, and the scan over layouts that lie.
#include <numeric>

#include "harness.h"
#include "naive.h"
#include "tensors.h"

namespace {

const ParallelFor kOneThread = [](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(0, count);
};

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

struct Layout {
  std::vector<int32_t> starts, counts;
  Responses responses;
  ScanRule rule;
};

/// Padded or packed with empty responses, with a carried count or without.
Layout make_layout(Random& random) {
  Layout layout;
  const int64_t count = random.integer(1, 4), length = random.integer(0, 6);
  const int64_t positions = count * length;
  layout.starts = {0};
  for (int64_t b = 1; b < count; ++b)
    layout.starts.push_back(static_cast<int32_t>(random.integer(layout.starts.back(), positions)));
  layout.starts.push_back(static_cast<int32_t>(positions));
  for (int64_t b = 0; b < count; ++b) layout.counts.push_back(static_cast<int32_t>(random.integer(0, 90)));
  layout.responses = {count, positions, nullptr};
  layout.rule = {random.pick<double>({0, .01, .3, 5}), random.pick<double>({0, .5}),
                 random.pick<double>({0, 1e-8, .5})};
  return layout;
}

/// The pointers into a layout are set where it has come to rest.
void settle(Layout& layout, bool packed, bool carried) {
  layout.responses.cu_seqlens = packed ? layout.starts.data() : nullptr;
  layout.rule.drift_count = carried ? layout.counts.data() : nullptr;
}

Tensor values(Random& random, Scalar type, Shape shape, bool rows, const std::function<double()>& value) {
  std::vector<double> numbers(
      static_cast<size_t>(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>())));
  for (double& number : numbers) number = value();
  Shape strides = contiguous(shape);
  if (random.chance(.3)) strides.back() = random.pick<int64_t>({2, -1});
  for (size_t axis = shape.size() - 1; axis-- > 0;)
    strides[axis] =
        (std::abs(strides[axis + 1]) * shape[axis + 1] + random.integer(0, 1)) * random.pick<int64_t>({1, -1});
  return Tensor(type, shape, strides, numbers, rows);
}

TEST(reliability_from_drift_agrees_with_the_naive_one) {
  Random random(5);
  for (int n = 0; n < 2000; ++n) {
    Layout layout = make_layout(random);
    const bool packed = random.chance(.5);
    settle(layout, packed, random.chance(.5));
    const int64_t count = layout.responses.count, positions = layout.responses.positions;
    const Shape shape = packed ? Shape{positions} : Shape{count, positions / count};
    const Tensor drift = values(random, Scalar::kBool, shape, false, [&] { return random.chance(.4); });
    const Tensor mask =
        values(random, static_cast<Scalar>(random.integer(0, 9)), shape, false, [&] { return random.chance(.7); });
    Scan want(layout.responses), got(layout.responses);
    ReliabilityFromDriftArgs args{drift.view, random.chance(.5) ? mask.view : View{}, layout.responses, layout.rule,
                                  want.outputs()};
    naive::reliability_from_drift(args);
    args.scan = got.outputs();
    reliability_from_drift(args, kOneThread);
    got.check("#" + std::to_string(n), want);
  }
}

TEST(reliability_from_topk_agrees_with_the_naive_one) {
  for (const std::string& isa : instruction_sets()) {
    CHECK(set_instruction_set(isa));
    Random random(6);
    for (int n = 0; n < 1500; ++n) {
      Layout layout = make_layout(random);
      const bool packed = random.chance(.5);
      settle(layout, packed, random.chance(.5));
      const int64_t count = layout.responses.count, positions = layout.responses.positions;
      const int64_t k = random.pick<int64_t>({1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 100, 256});
      const Shape shape = packed ? Shape{positions} : Shape{count, positions / count};
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
      const Tensor logprobs = values(
          random, random.pick<Scalar>({Scalar::kF32, Scalar::kF64, Scalar::kBF16, Scalar::kF16}), rows, true, [&] {
            return random.chance(.02) ? naive::kNaN : random.chance(.1) ? -naive::kInf : -random.integer(1, 64) / 8.0;
          });
      const Tensor token_ids =
          values(random, random.pick<Scalar>({Scalar::kI32, Scalar::kI64}), shape, false, small_id);
      const Tensor mask = values(random, Scalar::kI16, shape, false, [&] { return random.chance(.7) ? 256 : 0; });

      ReliabilityFromTopkArgs args;
      args.student_topk_ids = student.view;
      args.teacher_topk_ids = teacher.view;
      if (random.chance(.5)) args.mask = mask.view;
      args.drift_rule = {random.pick<Metric>({Metric::kOverlap, Metric::kTopP}), random.pick<double>({.2, .5, .7, 1}),
                         random.pick<double>({.3, .9})};
      if (args.drift_rule.metric == Metric::kTopP) {
        args.teacher_topk_logprobs = logprobs.view;
        args.token_ids = token_ids.view;
      }
      args.responses = layout.responses;
      args.scan_rule = layout.rule;
      args.k = k;
      Scan want(layout.responses), got(layout.responses);
      const auto run = [&](Scan& scan, const auto& op) {
        args.overlap = scan.overlap.data();
        args.drift = scan.drift.get();
        args.scan = scan.outputs();
        op(args);
      };
      run(want, [](const ReliabilityFromTopkArgs& args) { naive::reliability_from_topk(args); });
      run(got, [](const ReliabilityFromTopkArgs& args) { reliability_from_topk(args, kOneThread); });
      got.check(isa + " #" + std::to_string(n) + " k=" + std::to_string(k), want);
    }
  }
}

TEST(cu_seqlens_that_lie_are_no_addresses) {
  Random random(7);
  const int64_t positions = 9;
  const Tensor drift = values(random, Scalar::kBool, {positions}, false, [&] { return random.chance(.5); });
  for (const std::vector<int32_t>& starts : std::vector<std::vector<int32_t>>{
           {0, 9}, {-5, 30}, {9, 0}, {7, 3, 12}, {INT32_MIN, INT32_MAX}, {INT32_MAX, INT32_MIN}, {4, 4, 4}, {0}}) {
    const Responses responses{static_cast<int64_t>(starts.size()) - 1, positions, starts.data()};
    Scan scan(responses);
    reliability_from_drift({drift.view, View{}, responses, ScanRule{}, scan.outputs()}, kOneThread);
    for (const int32_t length : scan.effective_length) CHECK(length >= 0 && length <= positions);
  }
}

TEST(positions_of_any_strides) {
  Random random(8);
  for (int n = 0; n < 500; ++n) {
    Shape sizes, strides;
    for (int64_t axes = random.integer(0, 4); axes > 0; --axes) {
      sizes.push_back(random.integer(1, 4));
      strides.push_back(random.chance(.5) ? 0 : random.integer(-20, 20));
    }
    if (random.chance(.5)) strides = contiguous(sizes);
    const Positions at(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()));
    const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
    CHECK(at.count() == count);
    for (int64_t p = 0; p < count; ++p) {
      int64_t offset = 0, rest = p;
      for (size_t axis = sizes.size(); axis-- > 0; rest /= sizes[axis]) offset += rest % sizes[axis] * strides[axis];
      CHECK(at.offset(p) == offset);
    }
  }
  // Beyond 32 bits.
  const Shape sizes = {64, 12288}, strides = {12288 * int64_t{151936}, 151936};
  CHECK(Positions(sizes.data(), strides.data(), 2).offset(64 * 12288 - 1) == (64 * int64_t{12288} - 1) * 151936);
}

}  // namespace
