// The CUDA operators against the naive ones: the random cases of the CPU's tests, in several orders of threads and
// blocks, with rows whole and split over blocks. All of these must agree to the last bit.
#include <cstring>
#include <stdexcept>

#include "../cpp/harness.h"
#include "../cpp/logits_cases.h"
#include "../cpp/responses_cases.h"
#include "cuda/operators.h"
#include "emulator.h"

namespace {

using emulator::Order;

#ifdef __SANITIZE_THREAD__
constexpr int kFew = 20;  // a barrier of 256 threads takes a millisecond
#else
constexpr int kFew = 1;
#endif

/// Widths at which rows are cut into units, which several blocks may share.
const std::vector<int64_t> kWideWidths = {16383, 16384, 16385, 33000, 50000};

const std::vector<emulator::Settings> kSettings = {
    {Order::kForward, Order::kForward, 0, 132},
    {Order::kBackward, Order::kBackward, 0, 1},
    {Order::kShuffled, Order::kShuffled, 1, 5},
};

/// Memory of the device lives as long as the queue, and holds garbage at first.
template <class Args>
void compute(const Args& args) {
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  cuda::compute(args, {nullptr, 0, [&](int64_t bytes) -> void* {
                         memory.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
                         std::memset(memory.back().get(), 0xa5, static_cast<size_t>(bytes));
                         return memory.back().get();
                       }});
}

template <class T>
void check_same_bits(const std::string& where, const char* output, const std::vector<T>& got,
                     const std::vector<T>& want) {
  for (size_t n = 0; n < want.size(); ++n)
    if (std::memcmp(&got[n], &want[n], sizeof(T)) != 0) {
      report(where, ": ", output, "[", n, "] is ", +got[n], " in one order and ", +want[n], " in another");
      return;
    }
}

void check(const std::string& where, const TokenStats& got, const TokenStats& want) {
  check_equal(where, "student_topk_ids", got.student_ids, want.student_ids);
  check_equal(where, "teacher_topk_ids", got.teacher_ids, want.teacher_ids);
  for (size_t f = 0; f < got.floats.size(); ++f)
    check_equal(where, kFloatNames[f], got.floats[f], want.floats[f],
                std::string_view(kFloatNames[f]) == "overlap" ? 0 : kTolerance);
}

void check_same_bits(const std::string& where, const TokenStats& got, const TokenStats& want) {
  check_same_bits(where, "student_topk_ids", got.student_ids, want.student_ids);
  check_same_bits(where, "teacher_topk_ids", got.teacher_ids, want.teacher_ids);
  for (size_t f = 0; f < got.floats.size(); ++f) check_same_bits(where, kFloatNames[f], got.floats[f], want.floats[f]);
}

void check(const std::string& where, const Reliability& got, const Reliability& want) {
  check_equal(where, "drift", got.drift_values(), want.drift_values());
  check_equal(where, "overlap", got.overlap, want.overlap);
  check_equal(where, "drift_count", got.drift_count, want.drift_count);
  check_equal(where, "reliability", got.reliability, want.reliability);
  check_equal(where, "weight", got.weight, want.weight);
  check_equal(where, "effective_length", got.effective_length, want.effective_length);
  check_equal(where, "topk_ids", got.topk_ids, want.topk_ids);
  check_equal(where, "rewards", got.rewards, want.rewards, kTolerance);
}

/// What is not equal to the last bit anyway.
void check_same_bits(const std::string& where, const Reliability& got, const Reliability& want) {
  check_same_bits(where, "rewards", got.rewards, want.rewards);
}

/// Runs a case by all settings: compares with what `naive` says, and with each other.
template <class Outputs, class AnyCase, class Naive>
void check_case(const std::string& where, const AnyCase& c, const Naive& naive) {
  Outputs want, first;
  naive(c.args(want));
  for (size_t n = 0; n < kSettings.size(); ++n) {
    emulator::settings = kSettings[n];
    const std::string here = where + " by settings " + std::to_string(n);
    Outputs got;
    compute(c.args(got));
    check(here, got, want);
    if (n == 0)
      first = std::move(got);
    else
      check_same_bits(here, got, first);
  }
}

struct TokenStatsCase : Case {
  TokenStatsArgs args(TokenStats& outputs) const { return outputs.args(*this); }
};

void check_token_stats(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const TokenStatsCase c{make_case(random, widths)};
    check_case<TokenStats>("#" + std::to_string(n) + " " + c.what, c,
                           [](const auto& args) { naive::token_stats(args); });
  }
}

void check_reliability(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const ReliabilityCase c = make_reliability_case(random, widths);
    check_case<Reliability>("#" + std::to_string(n) + " " + c.logits.what, c,
                            [](const auto& args) { naive::reliability(args); });
  }
}

TEST(token_stats_agree_with_the_naive_ones) { check_token_stats(1, 500 / kFew, kWidths); }
TEST(token_stats_of_wide_rows) { check_token_stats(11, 60 / kFew, kWideWidths); }
TEST(reliability_agrees_with_the_naive_one) { check_reliability(2, 500 / kFew, kWidths); }
TEST(reliability_of_wide_rows) { check_reliability(12, 60 / kFew, kWideWidths); }

/// Along a response there is nothing that could differ in the last bit: check_equal is without tolerance.
template <class AnyCase, class Naive>
void check_responses(const std::string& where, const AnyCase& c, const Naive& naive) {
  Scan want(c.layout.responses());
  naive(c.args(want));
  for (const emulator::Settings& settings : kSettings) {
    emulator::settings = settings;
    Scan got(c.layout.responses());
    compute(c.args(got));
    got.check(where, want);
  }
}

TEST(reliability_from_drift_agrees_with_the_naive_one) {
  Random random(5);
  for (int n = 0; n < 1000 / kFew; ++n)
    check_responses("#" + std::to_string(n), make_drift_case(random, random.chance(.1) ? 1500 : 6),
                    [](const auto& args) { naive::reliability_from_drift(args); });
}

TEST(reliability_from_topk_agrees_with_the_naive_one) {
  Random random(6);
  for (int n = 0; n < 1000 / kFew; ++n) {
    const TopkCase c = make_topk_case(random, random.chance(.05) ? 600 : 6);
    check_responses("#" + std::to_string(n) + " k=" + std::to_string(c.k), c,
                    [](const auto& args) { naive::reliability_from_topk(args); });
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
