// The CPU operators against the oracle, with every instruction set of this machine, on one thread and on three.
#include <algorithm>

#include "cases.h"
#include "cpu/instruction_sets.h"
#include "cpu/row_pass.h"
#include "cpu/share_out.h"
#include "math/scalars.h"

namespace {

const ParallelFor kOneThread = [](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(0, count);
};
const ParallelFor kThreeThreads = [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  share_out(count, grain, 3, body, start_threads);
};

template <class Run>
void with_each_instruction_set(const Run& run) {
  for (const std::string& isa : instruction_sets()) {
    CHECK(set_instruction_set(isa));
    run(isa);
  }
}

template <class Args>
void check_operator(uint64_t calls, int64_t longest = 4) {
  for (uint64_t seed = 0; seed < calls; ++seed) {
    const ParallelFor* threads = nullptr;
    check_call<Args>(
        RandomCall(Args::kName, seed, kWidths, longest), seed,
        [&](const auto& visit) {
          with_each_instruction_set([&](const std::string& isa) {
            visit(isa, *(threads = &kOneThread) != nullptr);
            threads = &kThreeThreads;
            visit(isa + " on three threads", false);
          });
        },
        [&](const auto& args) { compute(args, *threads); });
  }
}

TEST(token_stats_agrees_with_the_oracle) { check_operator<TokenStatsArgs>(250); }
TEST(reliability_agrees_with_the_oracle) { check_operator<ReliabilityArgs>(250); }
TEST(reliability_from_topk_agrees_with_the_oracle) { check_operator<ReliabilityFromTopkArgs>(500); }
TEST(opd_scores_agrees_with_the_oracle) { check_operator<OpdScoresArgs>(250); }
TEST(row_stats_agrees_with_the_oracle) { check_operator<RowStatsArgs>(350); }
TEST(reverse_kl_agrees_with_the_oracle) { check_operator<ReverseKlArgs>(250); }
TEST(reliability_from_drift_agrees_with_the_oracle) {
  check_operator<ReliabilityFromDriftArgs>(500);
  check_operator<ReliabilityFromDriftArgs>(50, 600);  // beyond the blocks of 256 positions
}

TEST(cu_seqlens_that_lie_are_no_addresses) {
  check_lying_layouts([](const auto& args) { compute(args, kOneThread); });
}

TEST(an_instruction_set_is_chosen_by_name) {
  const std::vector<std::string> names = instruction_sets();
  CHECK(!names.empty() && names.back() == "portable");
  for (const std::string& name : names) CHECK(set_instruction_set(name) && instruction_set() == name);
  CHECK(!set_instruction_set("sse9") && instruction_set() == names.back());
  CHECK(set_instruction_set(names.front()));
}

TEST(a_peak_keeps_a_gradient_of_its_own) {
  const int64_t width = 100, peak = 60;
  Random random(14);
  const auto row = [&](double most) {
    int64_t v = 0;
    return make_tensor(
        random, Scalar::kF32, {1, width}, true, [&] { return v++ == peak ? most : random.normal(); }, true);
  };
  const Tensor student = row(25), teacher = row(3), one(Scalar::kF32, {1}, {1}, {1}, false);
  const Logits x{student.view, 1, width}, y{teacher.view, 1, width};
  float loss;
  double state[kDivergenceState];
  const ReverseKlArgs args{x, y, View{}, View{}, 1, {&loss, state}};
  with_each_instruction_set([&](const std::string&) {
    compute(args, kOneThread);
    const Tensor saved = moved(random, state, 1, kDivergenceState, kDivergenceState);
    std::vector<float> gradient(width, -7);
    const ReverseKlBackwardArgs backward{x, y, saved.view, one.view, 1, gradient.data(), width};
    compute(backward, kOneThread);
    const double want = naive::backward(backward, [](int64_t) { return 1; }).rows[0][peak];
    CHECK(std::abs(gradient[peak] - want) < 1e-5 * std::abs(want));
  });
}

/// Checks that factor * exp(0) is `want` at every id of a row, in whole steps and in the rest.
void check_rounding(const Tensor& zeros, int64_t width, float factor, double want) {
  float room[64];
  row_kernels().softmax_gradient({zeros.view.data, zeros.view.type, 1}, width, RowState{0, 1, 0}, factor, 0, room);
  const View view{room, zeros.view.type, Positions()};
  for (int64_t v = 0; v < width; ++v) {
    const double got = naive::value(view, 0, v);
    if (got == want && std::signbit(got) == std::signbit(want)) continue;
    report(instruction_set(), ": ", factor, " becomes ", got, ", not ", want, " at ", v);
    return;
  }
}

/// Checks each value of a type that has an upper neighbour, and values at and around their middle.
void check_roundings(Scalar type, uint16_t infinity, double (*value)(uint16_t), uint16_t (*bits)(float)) {
  const int64_t width = 37;
  const Tensor zeros(type, {1, width}, {width, 1}, std::vector<double>(static_cast<size_t>(width)), true);
  for (int n = 0; n < 0x10000; ++n) {
    const auto stored = static_cast<uint16_t>(n);
    CHECK(close(load_real(&stored, type, 0), value(stored), 0));
  }
  for (uint16_t n = 0; n < infinity; ++n) {
    const double low = value(n), high = value(n + 1), sign = n / 2 % 2 ? -1 : 1;
    const double half_step = (std::isinf(high) ? low - value(n - 1) : high - low) / 2;
    const float middle = static_cast<float>(low + half_step);
    CHECK(bits(static_cast<float>(low)) == n);
    const auto check = [&](float x, double want) {
      check_rounding(zeros, width, static_cast<float>(sign) * x, sign * want);
    };
    check(static_cast<float>(low), low);
    check(std::nextafter(middle, 0.0f), low);
    check(middle, n % 2 ? high : low);
    check(std::nextafter(middle, HUGE_VALF), high);
  }
}

TEST(gradients_are_rounded_to_nearest_even) {
  with_each_instruction_set([](const std::string&) {
    check_roundings(Scalar::kF16, 0x7c00, naive::half, half_bits);
    check_roundings(Scalar::kBF16, 0x7f80, naive::bfloat16, bfloat16_bits);
  });
}

TEST(a_state_that_lies_is_no_address) {
  const Tensor zeros(Scalar::kF32, {1, 37}, {37, 1}, std::vector<double>(37), true);
  const Row row{zeros.view.data, Scalar::kF32, 1};
  with_each_instruction_set([&](const std::string&) {
    std::vector<float> gradient(37, -7);
    // Its mass claims that one logit is greater than all others.
    row_kernels().divergence_gradient(row, row, 37, DivergenceState{-1, 1, 0, 0, 50}, 1, gradient.data());
    for (const float g : gradient) CHECK(close(g, std::exp(1), kTolerance));
  });
}

}  // namespace
