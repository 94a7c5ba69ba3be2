// The CUDA operators against the naive ones: the random cases of the CPU's tests, in several orders of threads and
// blocks, with rows whole and split over blocks. All of these must agree to the last bit.
#include <stdexcept>

#include "../cpp/logits_cases.h"
#include "../cpp/responses_cases.h"
#include "device.h"

namespace {

void check_same_bits(const std::string& where, const TokenStats& got, const TokenStats& want) {
  check_bits(where, "student_topk_ids", got.student_ids, want.student_ids);
  check_bits(where, "teacher_topk_ids", got.teacher_ids, want.teacher_ids);
  for (size_t f = 0; f < got.floats.size(); ++f) check_bits(where, kFloatNames[f], got.floats[f], want.floats[f]);
}

/// What is not equal to the last bit anyway.
void check_same_bits(const std::string& where, const Reliability& got, const Reliability& want) {
  check_bits(where, "rewards", got.rewards, want.rewards);
}

/// Runs case n by its settings: compares with what `naive` says, and the settings with each other.
template <class Outputs, class AnyCase, class Naive>
void check_case(int n, const std::string& what, const AnyCase& c, const Naive& naive) {
  Outputs want, first;
  naive(c.args(want));
  int run = 0;
  for (const emulator::Settings& settings : settings_of(n)) {
    emulator::settings = settings;
    const std::string where = "#" + std::to_string(n) + " " + what + " by settings " + std::to_string(run);
    Outputs got;
    compute(c.args(got));
    got.check(where, want);
    if (run++ == 0)
      first = std::move(got);
    else
      check_same_bits(where, got, first);
  }
}

struct TokenStatsCase : Case {
  TokenStatsArgs args(TokenStats& outputs) const { return outputs.args(*this); }
};

void check_token_stats(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const TokenStatsCase c{make_case(random, widths)};
    check_case<TokenStats>(n, c.what, c, [](const auto& args) { naive::token_stats(args); });
  }
}

void check_reliability(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const ReliabilityCase c = make_reliability_case(random, widths);
    check_case<Reliability>(n, c.logits.what, c, [](const auto& args) { naive::reliability(args); });
  }
}

TEST(token_stats_agree_with_the_naive_ones) { check_token_stats(1, some(300), kWidths); }
TEST(token_stats_of_wide_rows) { check_token_stats(11, some(30), kWideWidths); }
TEST(reliability_agrees_with_the_naive_one) { check_reliability(2, some(300), kWidths); }
TEST(reliability_of_wide_rows) { check_reliability(12, some(30), kWideWidths); }

/// Along a response nothing can differ in the last bit: Scan::check is without tolerance.
template <class AnyCase, class Naive>
void check_responses(int n, const AnyCase& c, const Naive& naive) {
  Scan want(c.layout.responses());
  naive(c.args(want));
  for (const emulator::Settings& settings : settings_of(n)) {
    emulator::settings = settings;
    Scan got(c.layout.responses());
    compute(c.args(got));
    got.check("#" + std::to_string(n), want);
  }
}

TEST(reliability_from_drift_agrees_with_the_naive_one) {
  Random random(5);
  for (int n = 0; n < some(500); ++n) {
    const DriftCase c = make_drift_case(random, random.chance(.1) ? 1500 : 6);
    check_responses(n, c, [](const auto& args) { naive::reliability_from_drift(args); });
  }
}

TEST(reliability_from_topk_agrees_with_the_naive_one) {
  Random random(6);
  for (int n = 0; n < some(500); ++n) {
    const TopkCase c = make_topk_case(random, random.chance(.05) ? 40 : 6);
    check_responses(n, c, [](const auto& args) { naive::reliability_from_topk(args); });
  }
}

TEST(cu_seqlens_that_lie_are_no_addresses) {
  Random random(7);
  const int64_t positions = 9;
  const Tensor drift = values(random, Scalar::kBool, {positions}, false, [&] { return random.chance(.5); });
  Case logits = make_case(random, {7});
  for (const std::vector<int32_t>& starts : std::vector<std::vector<int32_t>>{
           {0, 9}, {-5, 30}, {9, 0}, {7, 3, 12}, {INT32_MIN, INT32_MAX}, {INT32_MAX, INT32_MIN}, {4, 4, 4}, {0}}) {
    for (const emulator::Settings& settings : kSettings) {
      emulator::settings = settings;
      const Responses responses{static_cast<int64_t>(starts.size()) - 1, positions, view_of(starts)};
      Scan scan(responses);
      compute(ReliabilityFromDriftArgs{drift.view, View{}, responses, ScanRule{}, scan.outputs()});
      for (const int32_t length : scan.effective_length) CHECK(length >= 0 && length <= positions);
      Reliability outputs;
      compute(outputs.args(logits, {responses.count, logits.positions, view_of(starts)}));
    }
  }
}

template <class Args>
std::string refusal(const Args& args) {
  try {
    compute(args);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

TEST(what_a_device_cannot_take_is_refused) {
  Random random(9);
  Case c = make_case(random);
  TokenStats stats;
  Reliability outputs;
  emulator::settings = {};
  c.vocab_size = 1 << 24;  // nothing is read before the refusal
  const std::string too_wide = "vocab_size must be small enough for the tile maxima to fit in 232448 bytes";
  CHECK(refusal(stats.args(c)).find("token_stats: " + too_wide) == 0);
  CHECK(refusal(outputs.args(c, {1, c.positions, View{}})).find("reliability: " + too_wide) == 0);

  // Axes that cannot be walked as one.
  const std::vector<char> flags(2000);
  const auto refusal_of_axes = [&](size_t axes) {
    const Shape sizes(axes, 2);
    Shape strides = {1};
    while (strides.size() < axes) strides.insert(strides.begin(), 3 * strides[0]);
    const Positions at(sizes.data(), strides.data(), static_cast<int64_t>(axes));
    const Responses responses{1, at.count(), View{}};
    Scan scan(responses);
    return refusal(ReliabilityFromDriftArgs{{flags.data(), Scalar::kBool, at}, View{}, responses, {}, scan.outputs()});
  };
  CHECK(refusal_of_axes(6) == "none");
  CHECK(refusal_of_axes(7) ==
        "impl='cuda': a tensor must have at most 6 leading axes that cannot be walked as one, got 7");
}

TEST(no_positions_are_no_work) {
  Random random(4);
  Case c = make_case(random);
  c.positions = 0;
  for (const int64_t count : {0, 3}) {
    Reliability outputs;
    compute(outputs.args(c, {count, 0, View{}}));
    for (const int32_t length : outputs.effective_length) CHECK(length == 0);
  }
  TokenStats stats;
  compute(stats.args(c));
}

}  // namespace
