// reliability, token_stats and row_max against the naive operators: every instruction set of this machine, every type,
// widths around the vectors' and tiles' own, rows of every shape, masks and strides.
#include <algorithm>
#include <limits>
#include <thread>

#include "bindings/parallel.h"
#include "harness.h"
#include "naive.h"
#include "tensors.h"

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The tests of Python hold the numbers to float64 with error budgets; here a wrong path, not a rounding, has to show.
constexpr double kTolerance = 2e-5;

const ParallelFor kOneThread = [](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(0, count);
};

const ParallelFor kThreeThreads = [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  bindings::share_out(count, grain, 3, body, [](int64_t workers, const auto& worker) {
    std::vector<std::jthread> threads;
    for (int64_t n = 0; n < workers; ++n) threads.emplace_back(worker);
  });
};

struct Row {
  const char* name;
  double (*logit)(Random&, int64_t v, int64_t width);
};

const std::vector<Row> kRows = {
    {"random", [](Random& r, int64_t, int64_t) { return 3 * r.normal(); }},
    {"ties", [](Random& r, int64_t, int64_t) { return std::nearbyint(2 * r.normal()); }},
    {"ascending", [](Random&, int64_t v, int64_t) { return static_cast<double>(v) / 64; }},
    {"descending", [](Random&, int64_t v, int64_t width) { return static_cast<double>(width - v) / 64; }},
    {"equal", [](Random&, int64_t, int64_t) { return -2.5; }},
    {"zeros of both signs", [](Random& r, int64_t, int64_t) { return r.chance(.5) ? 0.0 : -0.0; }},
    {"far below zero", [](Random& r, int64_t, int64_t) { return -450 + r.normal(); }},
    {"mostly -inf", [](Random& r, int64_t v, int64_t) { return v && r.chance(.9) ? -kInf : r.normal(); }},
    {"only -inf", [](Random&, int64_t, int64_t) { return -kInf; }},
    {"one peak", [](Random&, int64_t v, int64_t width) { return v == width - 1 ? 90.0 : -90.0; }},
    {"steps", [](Random&, int64_t v, int64_t) { return static_cast<double>(v / 100 * 30); }},
    {"subnormal", [](Random& r, int64_t, int64_t) { return static_cast<double>(r.integer(-3, 3)) * 0x1p-149; }},
    {"huge", [](Random& r, int64_t, int64_t) { return 1e30 * r.normal(); }},
    {"NaN somewhere", [](Random& r, int64_t v, int64_t width) { return v == width / 2 ? kNaN : r.normal(); }},
    {"+inf somewhere", [](Random& r, int64_t v, int64_t width) { return v == width / 3 ? kInf : r.normal(); }},
};

/// Logits [positions, width] in one type: with gaps between rows or not, and the rows in order or backwards.
Tensor logits(Random& random, const Row& row, Scalar type, int64_t positions, int64_t width, std::string& what) {
  std::vector<double> values;
  for (int64_t n = 0; n < positions; ++n)
    for (int64_t v = 0; v < width; ++v) values.push_back(row.logit(random, v, width));
  const int64_t stride = (width + random.integer(0, 3)) * (random.chance(.2) ? -1 : 1);
  what += std::string(" ") + row.name + "/" + std::to_string(static_cast<int>(type)) + "/" + std::to_string(stride);
  return Tensor(type, {positions, width}, {stride, 1}, values, true);
}

Tensor flags(Random& random, int64_t positions) {
  std::vector<double> values;
  for (int64_t n = 0; n < positions; ++n) values.push_back(random.chance(.7));
  const Scalar type = static_cast<Scalar>(random.integer(0, 9));
  return Tensor(type, {positions}, {random.pick<int64_t>({1, 2, -1})}, values, false);
}

Tensor tokens(Random& random, int64_t positions, int64_t low, int64_t high) {
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

  LogitsPair pair() const { return {student.view, teacher.view, student_temperature, teacher_temperature, vocab_size}; }
};

Case make_case(Random& random) {
  const std::vector<int64_t> widths = {1,  2,   7,   8,   15,  16,   17,   31,   33,  63,
                                       65, 255, 511, 512, 513, 1000, 1023, 1025, 2600};
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
          random.chance(.8)};
}

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
};

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
};

TEST(token_stats_agree_with_the_naive_ones) {
  Random random(1);
  for (int n = 0; n < 500; ++n) {
    const Case c = make_case(random);
    TokenStats want;
    naive::token_stats(want.args(c));
    for (const std::string& isa : instruction_sets()) {
      CHECK(set_instruction_set(isa));
      const std::string where = isa + " #" + std::to_string(n) + " " + c.what;
      TokenStats got, again;
      token_stats(got.args(c), kOneThread);
      token_stats(again.args(c), kThreeThreads);
      check_equal(where, "student_topk_ids", got.student_ids, want.student_ids);
      check_equal(where, "teacher_topk_ids", got.teacher_ids, want.teacher_ids);
      for (size_t f = 0; f < got.floats.size(); ++f) {
        check_equal(where, kFloatNames[f], got.floats[f], want.floats[f], kTolerance);
        check_equal(where + " on three threads", kFloatNames[f], again.floats[f], got.floats[f]);
      }
    }
  }
}

TEST(reliability_agrees_with_the_naive_one) {
  Random random(2);
  for (int n = 0; n < 500; ++n) {
    const Case c = make_case(random);
    const std::vector<int32_t> starts = {0, static_cast<int32_t>(random.integer(0, c.positions)),
                                         static_cast<int32_t>(c.positions)};
    const std::vector<int32_t> counts = {3, 0};
    const bool packed = random.chance(.5), carried = packed && random.chance(.5);
    const Responses responses{packed ? 2 : 1, c.positions, packed ? starts.data() : nullptr};
    const DriftRule drift_rule{random.pick<Metric>({Metric::kOverlap, Metric::kTopP}), random.pick<double>({.7, .5, 1}),
                               random.pick<double>({.95, .5})};
    const ScanRule scan_rule{random.pick<double>({.01, .4}), random.pick<double>({.5, 0}), 1e-8,
                             carried ? counts.data() : nullptr};
    const RewardWeight weight = static_cast<RewardWeight>(random.integer(0, 2));
    const auto run = [&](Reliability& outputs, const auto& op) {
      ReliabilityArgs args = outputs.args(c, responses);
      args.drift_rule = drift_rule;
      args.scan_rule = scan_rule;
      args.reward_weight = weight;
      op(args);
    };
    Reliability want;
    run(want, [](const ReliabilityArgs& args) { naive::reliability(args); });
    for (const std::string& isa : instruction_sets()) {
      CHECK(set_instruction_set(isa));
      const std::string where = isa + " #" + std::to_string(n) + " " + c.what;
      Reliability got, again;
      run(got, [](const ReliabilityArgs& args) { reliability(args, kOneThread); });
      run(again, [](const ReliabilityArgs& args) { reliability(args, kThreeThreads); });
      check_equal(where, "drift", got.drift_values(), want.drift_values());
      check_equal(where + " on three threads", "drift", again.drift_values(), got.drift_values());
      check_equal(where, "overlap", got.overlap, want.overlap);
      check_equal(where, "drift_count", got.drift_count, want.drift_count);
      check_equal(where, "reliability", got.reliability, want.reliability);
      check_equal(where, "weight", got.weight, want.weight);
      check_equal(where, "effective_length", got.effective_length, want.effective_length);
      check_equal(where, "topk_ids", got.topk_ids, want.topk_ids);
      check_equal(where, "rewards", got.rewards, want.rewards, kTolerance);
      check_equal(where + " on three threads", "rewards", again.rewards, got.rewards);
    }
  }
}

TEST(row_max_reads_the_rows) {
  for (const std::string& isa : instruction_sets()) {
    CHECK(set_instruction_set(isa));
    Random random(3);
    for (int n = 0; n < 100; ++n) {
      Case c = make_case(random);
      std::vector<float> student(static_cast<size_t>(c.positions)), teacher(student);
      row_max(c.pair(), c.positions, student.data(), teacher.data(), kOneThread);
      for (int64_t at = 0; at < c.positions; ++at) {
        double most = -kInf;
        bool nan = false;
        for (int64_t v = 0; v < c.vocab_size; ++v) {
          most = std::max(most, naive::value(c.student.view, at, v));
          nan |= std::isnan(naive::value(c.student.view, at, v));
        }
        CHECK(nan || student[static_cast<size_t>(at)] == static_cast<float>(most));
      }
    }
  }
}

TEST(no_positions_are_no_work) {
  Random random(4);
  Case c = make_case(random);
  c.positions = 0;
  for (const int64_t count : {0, 3}) {
    Reliability outputs;
    reliability(outputs.args(c, {count, 0, nullptr}), kThreeThreads);
    for (const int32_t length : outputs.effective_length) CHECK(length == 0);
  }
  TokenStats stats;
  token_stats(stats.args(c), kThreeThreads);
}

TEST(an_instruction_set_is_chosen_by_name) {
  const std::vector<std::string> names = instruction_sets();
  CHECK(!names.empty() && names.back() == "portable");
  for (const std::string& name : names) CHECK(set_instruction_set(name) && instruction_set() == name);
  CHECK(!set_instruction_set("sse9") && instruction_set() == names.back());
  CHECK(set_instruction_set(names.front()));
}

}  // namespace
