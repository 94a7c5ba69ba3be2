// Random cases of the losses and of their backward passes, and room for what they give.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "logits_cases.h"
#include "naive_losses.h"

inline const std::vector<Scalar> kRealTypes = {Scalar::kF32, Scalar::kF64, Scalar::kBF16, Scalar::kF16};

/// What a forward pass has written, handed to the backward pass at other strides, against a page not to be touched.
inline Tensor moved(Random& random, const std::vector<float>& saved, int64_t positions) {
  size_t n = 0;
  return values(random, Scalar::kF32, {positions, static_cast<int64_t>(saved.size()) / positions}, true,
                [&] { return static_cast<double>(saved[n++]); });
}

/// The gradient that a backward pass fills completely: what was there before is wrong wherever it is left.
struct Gradient {
  Scalar type;
  int64_t vocab_size, width;
  Tensor tensor;

  Gradient(const Case& c, int64_t positions)
      : type(c.student.view.type),
        vocab_size(c.vocab_size),
        width(c.student_width),
        tensor(type, {positions, width}, {width, 1}, std::vector<double>(static_cast<size_t>(positions * width), -7),
               true) {}
  void* data() const { return const_cast<void*>(tensor.view.data); }
  double at(size_t n, size_t v) const {
    return naive::value(tensor.view, static_cast<int64_t>(n), static_cast<int64_t>(v));
  }

  /// Within a rounding of the type, and one of float32 where terms cancel.
  void check(const std::string& where, const naive::Losses& want) const {
    const double epsilon = type == Scalar::kBF16 ? 0x1p-8 : type == Scalar::kF16 ? 0x1p-11 : 0x1p-24;
    const double most = type == Scalar::kF16 ? 65504 : std::numeric_limits<float>::max();
    const double least = type == Scalar::kF16 ? 0x1p-25 : std::numeric_limits<float>::min();
    for (size_t n = 0; n < want.gradients.size(); ++n)
      for (size_t v = 0; v < want.gradients[n].size(); ++v) {
        const double exact = want.gradients[n][v], got = at(n, v);
        const double error = 1.01 * epsilon * std::abs(exact) + kTolerance / 10 * want.terms[n] + least;
        const auto in_range = [&](double x) { return std::isnan(x) ? x : std::clamp(x, -most, most); };
        const bool absent = static_cast<int64_t>(v) >= vocab_size;
        if (absent              ? got == 0
            : std::isnan(exact) ? std::isnan(got)
                                : std::abs(in_range(got) - in_range(exact)) <= error)
          continue;
        report(where, ": gradient[", n, "][", v, "] is ", got, ", not ", exact, "; its terms are ", want.terms[n]);
        return;
      }
  }
  void check_same(const std::string& where, const Gradient& other) const {
    const size_t bytes = static_cast<size_t>(tensor.view.at.count() * width) * item_size(type);
    if (std::memcmp(tensor.view.data, other.tensor.view.data, bytes) != 0) report(where, ": another gradient");
  }
};

/// The rows of a loss, and what each position's gradient is to be multiplied by.
struct LossCase {
  Case logits;
  Tensor scale;

  Logits student() const { return {logits.student.view, logits.student_temperature, logits.vocab_size}; }
  View mask() const { return logits.masked ? logits.mask.view : View{}; }
};

inline LossCase make_loss_case(Random& random) {
  Case c = make_case(random);
  if (random.chance(.15)) c.student_temperature = random.pick<double>({1e-3, 1e4, 1e-32, 1e-25, 1e35});
  if (random.chance(.15)) c.teacher_temperature = random.pick<double>({1e-3, 1e4, 1e30});
  c.what += " t=" + std::to_string(c.student_temperature) + "," + std::to_string(c.teacher_temperature);
  const Tensor scale = values(random, Scalar::kF32, {c.positions}, false, [&] {
    return random.chance(.1)    ? 0
           : random.chance(.02) ? random.pick<double>({naive::kNaN, naive::kInf})
           : random.chance(.05) ? random.pick<double>({1e38, 1e-30})
                                : random.normal();
  });
  return {c, scale};
}

inline LogprobsBackwardArgs backward_args(const LossCase& c, const View& ids, const Tensor& coefficients,
                                          const Tensor& state, int64_t m, const Gradient& gradient) {
  return {c.student(),        ids, coefficients.view, state.view,    c.scale.view,
          c.logits.positions, m,   gradient.data(),   gradient.width};
}

struct PolicyCase {
  LossCase loss;
  int64_t m;
  Tensor topk_ids, advantages, old_logprobs;
  bool off_policy;
  double clip_low, clip_high, clip_dual;

  TopkPolicyLossArgs args(float* loss_out, float* coefficients, float* state) const {
    return {loss.student(),
            topk_ids.view,
            advantages.view,
            off_policy ? old_logprobs.view : View{},
            loss.mask(),
            loss.logits.positions,
            m,
            clip_low,
            clip_high,
            clip_dual,
            loss_out,
            coefficients,
            state};
  }
};

/// Ids of which some are padding, many occur more than once and, in a few cases, some do not exist.
inline Tensor candidates(Random& random, int64_t positions, int64_t m, int64_t vocab_size) {
  const bool astray = random.chance(.1);
  return values(random, random.pick<Scalar>({Scalar::kI32, Scalar::kI64}), {positions, m}, true, [&] {
    if (astray && random.chance(.1)) return static_cast<double>(random.pick<int64_t>({vocab_size, INT32_MAX}));
    return static_cast<double>(random.chance(.1) ? random.integer(-9, -1) : random.integer(0, vocab_size - 1));
  });
}

inline PolicyCase make_policy_case(Random& random) {
  const LossCase c = make_loss_case(random);
  const int64_t positions = c.logits.positions, m = random.pick<int64_t>({1, 2, 3, 16, 33, 100, 511, 512});
  const bool idle = random.chance(.1), wild = random.chance(.1);
  const Tensor ids = candidates(random, positions, m, c.logits.vocab_size);
  const Tensor advantages = values(random, random.pick(kRealTypes), {positions, m}, true, [&] {
    if (idle || random.chance(.1)) return 0.0;
    return wild && random.chance(.1) ? random.pick<double>({naive::kNaN, naive::kInf, -naive::kInf}) : random.normal();
  });
  const double usual = -std::log(static_cast<double>(c.logits.vocab_size));
  const Tensor old = values(random, random.pick(kRealTypes), {positions, m}, true, [&] {
    return wild && random.chance(.1) ? random.pick<double>({naive::kNaN, -naive::kInf, -1e4}) : usual + random.normal();
  });
  return {c,
          m,
          ids,
          advantages,
          old,
          random.chance(.6),
          random.pick<double>({.2, 0, 1}),
          random.pick<double>({.2, .28, 0, 1e9}),
          random.pick<double>({3, 1.5, naive::kInf})};
}

struct ForwardKlCase {
  LossCase loss;
  Tensor teacher_topk_ids, teacher_topk_logprobs;
  double logprob_min;
};

inline ForwardKlCase make_forward_kl_case(Random& random) {
  const LossCase c = make_loss_case(random);
  const int64_t positions = c.logits.positions, k = c.logits.k;
  const bool wild = random.chance(.1);
  const Tensor ids = candidates(random, positions, k, c.logits.vocab_size);
  const Tensor logprobs = values(random, random.pick(kRealTypes), {positions, k}, true, [&] {
    return wild && random.chance(.05) ? naive::kNaN : random.chance(.1) ? -naive::kInf : -std::abs(4 * random.normal());
  });
  return {c, ids, logprobs, random.pick<double>({-naive::kInf, -naive::kInf, -23, -2})};
}

struct ForwardKl {
  std::vector<float> loss, student_mass, teacher_mass, overlap, advantage, coefficients, state;
  std::vector<int64_t> topk_ids;

  TopkForwardKlArgs args(const ForwardKlCase& c) {
    const size_t positions = static_cast<size_t>(c.loss.logits.positions);
    const size_t slots = positions * static_cast<size_t>(c.loss.logits.k);
    for (std::vector<float>* floats : {&loss, &student_mass, &teacher_mass, &overlap, &advantage})
      floats->assign(positions, -7);
    coefficients.assign(slots, -7);
    state.assign(positions * kRowState, -7);
    topk_ids.assign(slots, -7);
    return {c.loss.student(),
            c.teacher_topk_ids.view,
            c.teacher_topk_logprobs.view,
            c.loss.mask(),
            c.loss.logits.positions,
            c.loss.logits.k,
            c.logprob_min,
            loss.data(),
            student_mass.data(),
            teacher_mass.data(),
            overlap.data(),
            advantage.data(),
            topk_ids.data(),
            coefficients.data(),
            state.data()};
  }
  void check(const std::string& where, const ForwardKl& want) const {
    check_equal(where, "student_mass", student_mass, want.student_mass, kTolerance);
    check_equal(where, "teacher_mass", teacher_mass, want.teacher_mass, kTolerance);
    check_equal(where, "overlap", overlap, want.overlap);
    check_equal(where, "overlap_token_advantage", advantage, want.advantage, kTolerance);
    check_equal(where, "student_topk_ids", topk_ids, want.topk_ids);
  }
};

struct ReverseKlCase {
  LossCase loss;
  Tensor weight;
  bool weighted;

  ReverseKlArgs args(float* loss_out, float* state) const {
    return {loss.logits.pair(), loss.mask(), weighted ? weight.view : View{}, loss.logits.positions, loss_out, state};
  }
};

inline ReverseKlCase make_reverse_kl_case(Random& random) {
  const LossCase c = make_loss_case(random);
  const Tensor weight = values(random, random.pick(kRealTypes), {c.logits.positions}, false, [&] {
    return random.chance(.2) ? 0 : random.chance(.03) ? naive::kNaN : random.integer(-4, 6) / 4.0;
  });
  return {c, weight, random.chance(.5)};
}
