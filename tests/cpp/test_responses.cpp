// reliability_from_topk and reliability_from_drift against the naive operators, and the scan over layouts that lie.
#include <numeric>

#include "harness.h"
#include "parallel_for.h"
#include "responses_cases.h"

namespace {

TEST(reliability_from_drift_agrees_with_the_naive_one) {
  Random random(5);
  for (int n = 0; n < 2000; ++n) {
    const DriftCase c = make_drift_case(random);
    Scan want(c.layout.responses()), got(c.layout.responses());
    naive::reliability_from_drift(c.args(want));
    compute(c.args(got), kOneThread);
    got.check("#" + std::to_string(n), want);
  }
}

TEST(reliability_from_topk_agrees_with_the_naive_one) {
  for (const std::string& isa : instruction_sets()) {
    CHECK(set_instruction_set(isa));
    Random random(6);
    for (int n = 0; n < 1500; ++n) {
      const TopkCase c = make_topk_case(random);
      Scan want(c.layout.responses()), got(c.layout.responses());
      naive::reliability_from_topk(c.args(want));
      compute(c.args(got), kOneThread);
      got.check(isa + " #" + std::to_string(n) + " k=" + std::to_string(c.k), want);
    }
  }
}

TEST(cu_seqlens_that_lie_are_no_addresses) {
  Random random(7);
  const int64_t positions = 9;
  const Tensor drift = values(random, Scalar::kBool, {positions}, false, [&] { return random.chance(.5); });
  for (const std::vector<int32_t>& starts : std::vector<std::vector<int32_t>>{
           {0, 9}, {-5, 30}, {9, 0}, {7, 3, 12}, {INT32_MIN, INT32_MAX}, {INT32_MAX, INT32_MIN}, {4, 4, 4}, {0}}) {
    const Responses responses{static_cast<int64_t>(starts.size()) - 1, positions, view_of(starts)};
    Scan scan(responses);
    compute(ReliabilityFromDriftArgs{drift.view, View{}, responses, ScanRule{}, scan.outputs()}, kOneThread);
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
