// The losses and their backward passes against the naive ones, with every instruction set of this machine.
#include <algorithm>

#include "cpu/row_pass.h"
#include "losses_cases.h"
#include "parallel_for.h"

namespace {

template <class Run>
void with_each_instruction_set(const Run& run) {
  for (const std::string& isa : instruction_sets()) {
    CHECK(set_instruction_set(isa));
    run(isa);
  }
}

std::vector<float> as_floats(const std::vector<std::vector<double>>& rows) {
  std::vector<float> all;
  for (const std::vector<double>& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

/// Runs a backward pass twice, the second time on several threads, which changes no bit.
template <class Args>
void check_backward(const std::string& where, const Case& c, const naive::Losses& want, const Args& args) {
  const Gradient got(c, c.positions), again(c, c.positions);
  compute(args(got), kOneThread);
  compute(args(again), kThreeThreads);
  got.check(where, want);
  got.check_same(where + " on three threads", again);
}

TEST(topk_policy_loss_agrees_with_the_naive_one) {
  Random random(11);
  for (int n = 0; n < 400; ++n) {
    const PolicyCase c = make_policy_case(random);
    const Case& logits = c.loss.logits;
    const size_t positions = static_cast<size_t>(logits.positions);
    const naive::Losses want =
        naive::topk_policy_loss(c.args(nullptr, nullptr, nullptr), c.loss.scale.view, logits.student_width);
    with_each_instruction_set([&](const std::string& isa) {
      const std::string where = isa + " #" + std::to_string(n) + " m=" + std::to_string(c.m) + " " + logits.what;
      std::vector<float> loss(positions, -7), coefficients(positions * static_cast<size_t>(c.m), -7),
          state(positions * kRowState, -7);
      compute(c.args(loss.data(), coefficients.data(), state.data()), kThreeThreads);
      check_equal(where, "loss", loss, {want.loss.begin(), want.loss.end()}, kTolerance);
      check_equal(where, "coefficients", coefficients, as_floats(want.coefficients), kTolerance);
      const Tensor given = moved(random, coefficients, logits.positions),
                   saved = moved(random, state, logits.positions);
      check_backward(where, logits, want, [&](const Gradient& gradient) {
        return backward_args(c.loss, c.topk_ids.view, given, saved, c.m, gradient);
      });
    });
  }
}

TEST(topk_forward_kl_agrees_with_the_naive_one) {
  Random random(12);
  for (int n = 0; n < 400; ++n) {
    const ForwardKlCase c = make_forward_kl_case(random);
    const Case& logits = c.loss.logits;
    ForwardKl wanted;
    const naive::Losses want = naive::topk_forward_kl(wanted.args(c), c.loss.scale.view, logits.student_width);
    with_each_instruction_set([&](const std::string& isa) {
      const std::string where = isa + " #" + std::to_string(n) + " " + logits.what;
      ForwardKl got;
      compute(got.args(c), kThreeThreads);
      got.check(where, wanted);
      check_equal(where, "loss", got.loss, {want.loss.begin(), want.loss.end()}, kTolerance);
      check_equal(where, "coefficients", got.coefficients, as_floats(want.coefficients), kTolerance);
      const Tensor given = moved(random, got.coefficients, logits.positions),
                   saved = moved(random, got.state, logits.positions);
      check_backward(where, logits, want, [&](const Gradient& gradient) {
        return backward_args(c.loss, c.teacher_topk_ids.view, given, saved, logits.k, gradient);
      });
    });
  }
}

TEST(reverse_kl_agrees_with_the_naive_one) {
  Random random(13);
  for (int n = 0; n < 600; ++n) {
    const ReverseKlCase c = make_reverse_kl_case(random);
    const Case& logits = c.loss.logits;
    const size_t positions = static_cast<size_t>(logits.positions);
    // As the caller does: a position that does not count has a scale of 0.
    std::vector<float> scales;
    for (int64_t at = 0; at < logits.positions; ++at) {
      const bool used = naive::valid(c.loss.mask(), at) && (!c.weighted || naive::value(c.weight.view, at) != 0);
      scales.push_back(used ? static_cast<float>(naive::value(c.loss.scale.view, at)) : 0);
    }
    const Tensor scale = moved(random, scales, logits.positions);
    const naive::Losses want = naive::reverse_kl(c.args(nullptr, nullptr), scale.view, logits.student_width);
    with_each_instruction_set([&](const std::string& isa) {
      const std::string where = isa + " #" + std::to_string(n) + " " + logits.what;
      std::vector<float> loss(positions, -7), state(positions * kDivergenceState, -7);
      compute(c.args(loss.data(), state.data()), kThreeThreads);
      check_equal(where, "loss", loss, {want.loss.begin(), want.loss.end()}, kTolerance);
      const Tensor saved = moved(random, state, logits.positions);
      check_backward(where, logits, want, [&](const Gradient& gradient) {
        return ReverseKlBackwardArgs{logits.pair(),    saved.view,      scale.view,
                                     logits.positions, gradient.data(), gradient.width};
      });
    });
  }
}

TEST(a_peak_keeps_a_gradient_of_its_own) {
  const int64_t width = 100, peak = 60;
  Random random(14);
  const auto row = [&](double most) {
    std::vector<double> numbers;
    for (int64_t v = 0; v < width; ++v) numbers.push_back(v == peak ? most : random.normal());
    return Tensor(Scalar::kF32, {1, width}, {width, 1}, numbers, true);
  };
  const Tensor student = row(25), teacher = row(3), one(Scalar::kF32, {1}, {1}, {1}, false);
  const LogitsPair logits{student.view, teacher.view, 1, 1, width};
  float loss, state[kDivergenceState];
  const ReverseKlArgs args{logits, View{}, View{}, 1, &loss, state};
  const double want = naive::reverse_kl(args, one.view, width).gradients[0][peak];
  with_each_instruction_set([&](const std::string&) {
    compute(args, kOneThread);
    const Tensor saved(Scalar::kF32, {1, kDivergenceState}, {kDivergenceState, 1}, {state, state + kDivergenceState},
                       true);
    std::vector<float> gradient(width, -7);
    compute(ReverseKlBackwardArgs{logits, saved.view, one.view, 1, gradient.data(), width}, kOneThread);
    CHECK(std::abs(gradient[peak] - want) < 1e-5 * std::abs(want));
  });
}

/// factor * exp(0) at every id of a row, whole steps and what is left of one, must be `want`.
void check_rounding(const Tensor& zeros, int64_t width, float factor, double want) {
  float room[64];
  row_kernels().scaled_softmax({zeros.view.data, zeros.view.type, 1}, width, RowState(0, 1), factor, room);
  const View view{room, zeros.view.type, Positions()};
  for (int64_t v = 0; v < width; ++v) {
    const double got = naive::value(view, 0, v);
    if (got == want && std::signbit(got) == std::signbit(want)) continue;
    report(instruction_set(), ": ", factor, " becomes ", got, ", not ", want, " at ", v);
    return;
  }
}

/// Each value of a type that has an upper neighbour, and what lies at and about the middle of both.
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
    // Its mass says that the reference has a logit of its own, greater than all others.
    row_kernels().divergence_gradient(row, row, 37, DivergenceState(-1, 1, 0, 0, 50), 1, gradient.data());
    for (const float g : gradient) CHECK(close(g, std::exp(1), kTolerance));
  });
}

}  // namespace
