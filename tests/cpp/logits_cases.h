// Random cases of reliability and token_stats: every type, rows of every shape, masks and strides; and room for what
// the operators give.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "harness.h"
#include "naive.h"
#include "tensors.h"

// The tests of Python hold the numbers to float64 with error budgets; here a wrong path, not a rounding, has to show.
inline constexpr double kTolerance = 2e-5;

struct RowKind {
  const char* name;
  double (*logit)(Random&, int64_t v, int64_t width);
};

inline const std::vector<RowKind> kRows = {
    {"random", [](Random& r, int64_t, int64_t) { return 3 * r.normal(); }},
    {"ties", [](Random& r, int64_t, int64_t) { return std::nearbyint(2 * r.normal()); }},
    {"ascending", [](Random&, int64_t v, int64_t) { return static_cast<double>(v) / 64; }},
    {"descending", [](Random&, int64_t v, int64_t width) { return static_cast<double>(width - v) / 64; }},
    {"equal", [](Random&, int64_t, int64_t) { return -2.5; }},
    {"zeros of both signs", [](Random& r, int64_t, int64_t) { return r.chance(.5) ? 0.0 : -0.0; }},
    {"far below zero", [](Random& r, int64_t, int64_t) { return -450 + r.normal(); }},
    {"mostly -inf", [](Random& r, int64_t v, int64_t) { return v && r.chance(.9) ? -naive::kInf : r.normal(); }},
    {"only -inf", [](Random&, int64_t, int64_t) { return -naive::kInf; }},
    {"one peak", [](Random&, int64_t v, int64_t width) { return v == width - 1 ? 90.0 : -90.0; }},
    {"steps", [](Random&, int64_t v, int64_t) { return static_cast<double>(v / 100 * 30); }},
    {"subnormal", [](Random& r, int64_t, int64_t) { return static_cast<double>(r.integer(-3, 3)) * 0x1p-149; }},
    {"huge", [](Random& r, int64_t, int64_t) { return 1e30 * r.normal(); }},
    {"NaN somewhere", [](Random& r, int64_t v, int64_t width) { return v == width / 2 ? naive::kNaN : r.normal(); }},
    {"+inf somewhere", [](Random& r, int64_t v, int64_t width) { return v == width / 3 ? naive::kInf : r.normal(); }},
};

/// Logits [positions, width] in one type: with gaps between rows or not, and the rows in order or backwards.
inline Tensor logits(Random& random, const RowKind& row, Scalar type, int64_t positions, int64_t width,
                     std::string& what) {
  std::vector<double> values;
  for (int64_t n = 0; n < positions; ++n)
    for (int64_t v = 0; v < width; ++v) values.push_back(row.logit(random, v, width));
  const int64_t stride = (width + random.integer(0, 3)) * (random.chance(.2) ? -1 : 1);
  what += std::string(" ") + row.name + "/" + std::to_string(static_cast<int>(type)) + "/" + std::to_string(stride);
  return Tensor(type, {positions, width}, {stride, 1}, values, true);
}

inline Tensor flags(Random& random, int64_t positions) {
  std::vector<double> values;
  for (int64_t n = 0; n < positions; ++n) values.push_back(random.chance(.7));
  const Scalar type = static_cast<Scalar>(random.integer(0, 9));
  return Tensor(type, {positions}, {random.pick<int64_t>({1, 2, -1})}, values, false);
}

inline Tensor tokens(Random& random, int64_t positions, int64_t low, int64_t high) {
  std::vector<double> values;
  for (int64_t n = 0; n < positions; ++n) values.push_back(static_cast<double>(random.integer(low, high)));
  return Tensor(random.pick<Scalar>({Scalar::kI32, Scalar::kI64}), {positions}, {random.pick<int64_t>({1, 3})}, values,
                false);
}

struct Case {
  std::string what;
  int64_t positions, vocab_size, k;
  Tensor student, teacher, mask, token_ids;
  double student_temperature, teacher_temperature;
  bool masked, sampled;
  int64_t student_width;

  LogitsPair pair() const { return {student.view, teacher.view, student_temperature, teacher_temperature, vocab_size}; }
};

/// Widths around those of vectors and tiles.
inline const std::vector<int64_t> kWidths = {1,  2,   7,   8,   15,  16,   17,   31,   33,  63,
                                             65, 255, 511, 512, 513, 1000, 1023, 1025, 2600};

inline Case make_case(Random& random, const std::vector<int64_t>& widths = kWidths) {
  const std::vector<Scalar> types = {Scalar::kF32, Scalar::kF32, Scalar::kBF16, Scalar::kF16};
  const int64_t positions = random.integer(1, 5), vocab_size = random.pick(widths);
  const int64_t most = std::min<int64_t>(vocab_size, 256);
  const int64_t k = std::min(most, random.pick<int64_t>({1, 2, 5, 16, 64, 255, 256}));
  std::string what = "V=" + std::to_string(vocab_size) + " k=" + std::to_string(k);
  // What lies beyond vocab_size is not there: let it be the largest.
  const int64_t student_extra = random.chance(.3) ? random.integer(1, 40) : 0,
                teacher_extra = random.chance(.3) ? 5 : 0;
  Tensor student = logits(random, random.pick(kRows), random.pick(types), positions, vocab_size + student_extra, what);
  Tensor teacher = logits(random, random.pick(kRows), random.pick(types), positions, vocab_size + teacher_extra, what);
  Tensor mask = flags(random, positions), token_ids = tokens(random, positions, -2, vocab_size + 1);
  const double student_temperature = random.pick<double>({1, 1, .6, 2}),
               teacher_temperature = random.pick<double>({1, .7});
  return {what,
          positions,
          vocab_size,
          k,
          student,
          teacher,
          mask,
          token_ids,
          student_temperature,
          teacher_temperature,
          random.chance(.4),
          random.chance(.8),
          vocab_size + student_extra};
}

constexpr const char* kFloatNames[] = {"student_topk_logprobs",
                                       "teacher_topk_logprobs",
                                       "teacher_on_student_logprobs",
                                       "student_on_teacher_logprobs",
                                       "overlap",
                                       "student_lse",
                                       "teacher_lse",
                                       "student_entropy",
                                       "teacher_entropy",
                                       "reverse_kl",
                                       "forward_kl",
                                       "student_token_logprob",
                                       "teacher_token_logprob"};

struct TokenStats {
  std::vector<int64_t> student_ids, teacher_ids;
  std::vector<std::vector<float>> floats;

  TokenStatsArgs args(const Case& c) {
    const size_t positions = static_cast<size_t>(c.positions), slots = positions * static_cast<size_t>(c.k);
    student_ids.assign(slots, -7);
    teacher_ids.assign(slots, -7);
    floats.clear();
    for (int n = 0; n < 13; ++n) floats.emplace_back(n < 4 ? slots : positions, -7.0f);
    TokenStatsArgs args;
    args.logits = c.pair();
    if (c.masked) args.mask = c.mask.view;
    if (c.sampled) args.token_ids = c.token_ids.view;
    args.positions = c.positions;
    args.k = c.k;
    args.student_topk_ids = student_ids.data();
    args.teacher_topk_ids = teacher_ids.data();
    float** outputs[] = {&args.student_topk_logprobs,
                         &args.teacher_topk_logprobs,
                         &args.teacher_on_student_logprobs,
                         &args.student_on_teacher_logprobs,
                         &args.overlap,
                         &args.student_lse,
                         &args.teacher_lse,
                         &args.student_entropy,
                         &args.teacher_entropy,
                         &args.reverse_kl,
                         &args.forward_kl,
                         &args.student_token_logprob,
                         &args.teacher_token_logprob};
    for (size_t n = 0; n < floats.size(); ++n) *outputs[n] = floats[n].data();
    return args;
  }
  void check(const std::string& where, const TokenStats& want) const {
    check_equal(where, "student_topk_ids", student_ids, want.student_ids);
    check_equal(where, "teacher_topk_ids", teacher_ids, want.teacher_ids);
    for (size_t f = 0; f < floats.size(); ++f)
      check_equal(where, kFloatNames[f], floats[f], want.floats[f],
                  std::string_view(kFloatNames[f]) == "overlap" ? 0 : kTolerance);
  }
};

struct Reliability {
  std::vector<float> overlap, reliability, weight, rewards;
  std::unique_ptr<bool[]> drift;
  std::vector<int32_t> drift_count, effective_length;
  std::vector<int64_t> topk_ids;

  ReliabilityArgs args(const Case& c, const Responses& responses) {
    const size_t positions = static_cast<size_t>(c.positions), slots = positions * static_cast<size_t>(c.k);
    for (std::vector<float>* floats : {&overlap, &reliability, &weight}) floats->assign(positions, -7);
    rewards.assign(slots, -7);
    drift = std::make_unique<bool[]>(positions);
    drift_count.assign(positions, -7);
    effective_length.assign(static_cast<size_t>(responses.count), -7);
    topk_ids.assign(slots, -7);
    ReliabilityArgs args;
    args.logits = c.pair();
    if (c.masked) args.mask = c.mask.view;
    args.token_ids = c.token_ids.view;
    args.responses = responses;
    args.k = c.k;
    args.overlap = overlap.data();
    args.drift = drift.get();
    args.scan = {drift_count.data(), reliability.data(), weight.data(), effective_length.data()};
    args.topk_ids = topk_ids.data();
    args.rewards = rewards.data();
    return args;
  }
  std::vector<int> drift_values() const { return {drift.get(), drift.get() + overlap.size()}; }
  void check(const std::string& where, const Reliability& want) const {
    check_equal(where, "drift", drift_values(), want.drift_values());
    check_equal(where, "overlap", overlap, want.overlap);
    check_equal(where, "drift_count", drift_count, want.drift_count);
    check_equal(where, "reliability", reliability, want.reliability);
    check_equal(where, "weight", weight, want.weight);
    check_equal(where, "effective_length", effective_length, want.effective_length);
    check_equal(where, "topk_ids", topk_ids, want.topk_ids);
    check_equal(where, "rewards", rewards, want.rewards, kTolerance);
  }
};

/// A case of reliability: padded or packed, with a carried count or without, by any rule.
struct ReliabilityCase {
  Case logits;
  std::vector<int32_t> starts = {}, counts = {3, 0};
  bool packed = false, carried = false;
  DriftRule drift_rule = {};
  double w_drop = 0, w_base = 0;
  RewardWeight reward_weight = RewardWeight::kStudent;

  ReliabilityArgs args(Reliability& outputs) const {
    ReliabilityArgs args = outputs.args(logits, {packed ? 2 : 1, logits.positions, packed ? view_of(starts) : View{}});
    args.drift_rule = drift_rule;
    args.scan_rule = {w_drop, w_base, 1e-8, carried ? view_of(counts) : View{}};
    args.reward_weight = reward_weight;
    return args;
  }
};

inline ReliabilityCase make_reliability_case(Random& random, const std::vector<int64_t>& widths = kWidths) {
  ReliabilityCase c{make_case(random, widths)};
  c.starts = {0, static_cast<int32_t>(random.integer(0, c.logits.positions)), static_cast<int32_t>(c.logits.positions)};
  c.packed = random.chance(.5);
  c.carried = c.packed && random.chance(.5);
  c.drift_rule = {random.pick<Metric>({Metric::kOverlap, Metric::kTopP}), random.pick<double>({.7, .5, 1}),
                  random.pick<double>({.95, .5})};
  c.w_drop = random.pick<double>({.01, .4});
  c.w_base = random.pick<double>({.5, 0});
  c.reward_weight = static_cast<RewardWeight>(random.integer(0, 2));
  return c;
}
