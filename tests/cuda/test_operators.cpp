// The CUDA operators and their backward passes against the oracle, in several orders of threads and blocks, with rows
// whole and split over blocks. All of these must agree to the last bit.
#include <cstring>
#include <memory>
#include <stdexcept>

#include "../cpp/cases.h"
#include "cuda/launch.h"
#include "emulator.h"

namespace {

using emulator::Order;

/// Rows are cut into units of 16384 ids, which several blocks may share.
const std::vector<int64_t> kWideWidths = {16383, 16384, 16385, 50000};

/// Threads, blocks, seed, multiprocessors: rows are split over many blocks, over none, over some.
const std::vector<emulator::Settings> kSettings = {
    {Order::kForward, Order::kForward, 0, 132},
    {Order::kBackward, Order::kBackward, 0, 1},
    {Order::kShuffled, Order::kShuffled, 1, 5},
};

/// Memory of the device lives as long as the queue, and holds garbage at first.
template <class Args>
void compute(const Args& args) {
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  cuda::compute(args, cuda::Queue{nullptr, 0, [&](int64_t bytes) -> void* {
                                    memory.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
                                    return std::memset(memory.back().get(), 0xa5, static_cast<size_t>(bytes));
                                  }});
}

/// ThreadSanitizer takes its time and asks for no particular order: it runs each call by one of the settings.
template <class Args>
void check_operator(uint64_t calls, const std::vector<int64_t>& widths = kWidths, int64_t longest = 3) {
  for (uint64_t seed = 0; seed < calls; ++seed)
    check_call<Args>(
        RandomCall(Args::kName, seed, widths, longest), seed,
        [&](const auto& visit) {
          for (size_t n = 0; n < kSettings.size(); ++n) {
            if (emulator::kFindsRaces && n != seed % kSettings.size()) continue;
            emulator::settings = kSettings[n];
            visit("settings " + std::to_string(n), n == 0 || emulator::kFindsRaces);
          }
        },
        [](const auto& args) { compute(args); });
}

TEST(token_stats_agrees_with_the_oracle) { check_operator<TokenStatsArgs>(60); }
TEST(reliability_agrees_with_the_oracle) { check_operator<ReliabilityArgs>(60); }
TEST(opd_scores_agrees_with_the_oracle) { check_operator<OpdScoresArgs>(60); }
TEST(row_stats_agrees_with_the_oracle) { check_operator<RowStatsArgs>(60); }
TEST(reverse_kl_agrees_with_the_oracle) { check_operator<ReverseKlArgs>(60); }

// Tests of their own: races.py takes fences between blocks away in these alone.
TEST(token_stats_of_wide_rows) { check_operator<TokenStatsArgs>(10, kWideWidths, 1); }
TEST(reliability_of_wide_rows) { check_operator<ReliabilityArgs>(10, kWideWidths, 1); }
TEST(opd_scores_of_wide_rows) { check_operator<OpdScoresArgs>(10, kWideWidths, 1); }
TEST(row_stats_of_wide_rows) { check_operator<RowStatsArgs>(10, kWideWidths, 1); }
TEST(reverse_kl_of_wide_rows) { check_operator<ReverseKlArgs>(10, kWideWidths, 1); }

TEST(reliability_from_topk_agrees_with_the_oracle) {
  check_operator<ReliabilityFromTopkArgs>(150);
  check_operator<ReliabilityFromTopkArgs>(10, kWidths, 40);
}
TEST(reliability_from_drift_agrees_with_the_oracle) {
  check_operator<ReliabilityFromDriftArgs>(150);
  check_operator<ReliabilityFromDriftArgs>(20, kWidths, 1500);  // beyond the chunks of 1024 positions
}

TEST(cu_seqlens_that_lie_are_no_addresses) {
  for (const emulator::Settings& settings : kSettings) {
    emulator::settings = settings;
    check_lying_layouts([](const auto& args) { compute(args); });
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
  emulator::settings = {};
  const float logit = 0;
  const Logits wide{{&logit, Scalar::kF32, {}, 1}, 1, 1 << 24};  // nothing is read before the refusal
  const std::string too_wide = "vocab_size must be small enough for the tile maxima to fit in 232448 bytes";
  CHECK(refusal(TokenStatsArgs{wide, wide, {}, {}, 1, 1, {}}).find("token_stats: " + too_wide) == 0);
  ReliabilityArgs reliability;
  reliability.student = reliability.teacher = wide;
  reliability.responses = {1, 1, {}};
  reliability.k = 1;
  CHECK(refusal(reliability).find("reliability: " + too_wide) == 0);

  // Axes that cannot be walked as one.
  const std::vector<char> flags(2000);
  const auto refusal_of_axes = [&](size_t axes) {
    const Shape sizes(axes, 2);
    Shape strides = {1};
    while (strides.size() < axes) strides.insert(strides.begin(), 3 * strides[0]);
    const Positions at(sizes.data(), strides.data(), static_cast<int64_t>(axes));
    std::vector<float> floats(2 * static_cast<size_t>(at.count()));
    std::vector<int32_t> counts(static_cast<size_t>(at.count()) + 1);
    return refusal(
        ReliabilityFromDriftArgs{{flags.data(), Scalar::kBool, at},
                                 {},
                                 {1, at.count(), {}},
                                 {},
                                 {counts.data(), floats.data(), floats.data() + at.count(), &counts.back()}});
  };
  CHECK(refusal_of_axes(6) == "none");
  CHECK(refusal_of_axes(7) ==
        "impl='cuda': a tensor must have at most 6 leading axes that cannot be walked as one, got 7");
}

}  // namespace
