// Random calls of every operator: arguments of every type, layout and kind of row, by their names; and the outputs.
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "harness.h"
#include "naive.h"
#include "tensors.h"

// Python tests hold the numbers to float64 with error budgets. These tests detect a wrong path, not a rounding.
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
    // On both sides: where one model's probability is near 1e-38, the other's logit is -1e38, and their product counts.
    {"far down or huge",
     [](Random& r, int64_t v, int64_t) { return v % 8 != 1     ? r.normal()
                                                : r.chance(.5) ? -88 - r.chance(.5)
                                                               : -1e38; }},
    {"+inf somewhere", [](Random& r, int64_t v, int64_t width) { return v == width / 3 ? naive::kInf : r.normal(); }},
};

/// A row is cut in steps of 8, 16 or 32 ids (one for each instruction set), tiles of 512 and chains of 256, 512 or
/// 1024; on a GPU in tiles of 128 or 256. These lie on each side of each boundary; 2600 ids are more tiles than some k.
inline const std::vector<int64_t> kWidths = {1,   2,   7,   8,   9,   15,  16,  17,   31,   32,   33,  127,
                                             129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2600};

inline const std::vector<Scalar> kRealTypes = {Scalar::kF32, Scalar::kF64, Scalar::kBF16, Scalar::kF16};
inline const std::vector<Scalar> kIdTypes = {Scalar::kI32, Scalar::kI64};

/// A call with random arguments; each read of an argument returns the same values.
class RandomCall : public Call {
 public:
  /// `longest`: the most positions of a response.
  RandomCall(const char* op, uint64_t seed, const std::vector<int64_t>& widths, int64_t longest)
      : Call(op, "cpu"), op_name_(op), random_(seed), vocab_size_(random_.pick(widths)) {
    k_ =
        random_.pick<int64_t>({1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 255, 256});  // on each side of 8 and 16, and the most
    if (op_name_ != "reliability_from_topk") k_ = std::min(k_, vocab_size_);
    if (op_name_ == "row_stats" && random_.chance(.3)) k_ = 0;
    m_ = random_.pick<int64_t>({1, 2, 16, 33, 511, 512});
    const int64_t length = random_.chance(.1) ? 0 : random_.integer(1, longest), responses = random_.integer(1, 3);
    packed_ = random_.chance(.5);
    positions_ = packed_ ? Shape{responses * length} : Shape{responses, length};
    for (int64_t b = 0; b < responses; ++b)
      starts_.push_back(random_.integer(b ? starts_.back() : 0, count(positions_)));
    starts_[0] = 0;
    starts_.push_back(count(positions_));
    top_p_ = random_.chance(.5);
    wild_ = random_.chance(.15);
    what = op_name_ + " #" + std::to_string(seed) + " V=" + std::to_string(vocab_size_) + " k=" + std::to_string(k_);
  }

  Array tensor(const char* name) override { return input(name).array(); }
  MaybeArray optional_tensor(const char* name) override {
    const std::string_view argument = name;
    const bool for_top_p = argument == "token_ids" || argument == "teacher_topk_logprobs";
    const double p = argument == "cu_seqlens" ? packed_ : for_top_p && top_p_ ? 1 : .5;
    if (!given_.try_emplace(name, random_.chance(p)).first->second) return std::nullopt;
    return input(name).array();
  }
  int64_t integer(const char*) override { return k_; }
  std::optional<int64_t> optional_integer(const char*) override { return vocab_size_; }
  double number(const char* name) override {
    static const std::map<std::string, std::vector<double>> kChoices{{"threshold", {.2, .5, .7, 1}},
                                                                     {"top_p", {.3, .5, .9, .95, 1}},
                                                                     {"w_drop", {0, .01, .3, 5}},
                                                                     {"w_base", {0, .5}},
                                                                     {"eps", {0, 1e-8, .5}},
                                                                     {"temperature", {1, 1, .6, 2}},
                                                                     {"student_temperature", {1, 1, .6, 2}},
                                                                     {"teacher_temperature", {1, .7}}};
    static const std::vector<double> kExtreme{1e-3, 1e4, 1e-32, 1e-25, 1e35};
    const auto [number, is_new] = numbers_.try_emplace(name);
    const bool extreme = wild_ && has_state() && std::string_view(name) != "teacher_temperature" &&
                         std::string_view(name).ends_with("temperature");
    if (is_new) number->second = random_.pick(extreme ? kExtreme : kChoices.at(name));
    return number->second;
  }
  bool boolean(const char* name) override { return flags_.try_emplace(name, random_.chance(.5)).first->second; }
  std::string text(const char* name) override {
    if (std::string_view(name) == "metric") return top_p_ ? "top_p" : "overlap";
    return texts_.try_emplace(name, random_.pick<std::string>({"student", "teacher", "none"})).first->second;
  }

  /// Returns the arguments of the operator, with new outputs that hold -7.
  template <class Args>
  Args arguments() {
    outputs.clear();
    return Args::from(*this);
  }
  /// Whether the last output is a state, for a backward pass.
  bool has_state() const { return op_name_ == "row_stats" || op_name_ == "reverse_kl" || op_name_ == "opd_scores"; }
  int64_t width() { return input(op_name_ == "row_stats" ? "logits" : "student_logits").array().shape.back(); }

  std::string what;
  std::vector<Tensor> outputs;

 protected:
  void* make_output(const Shape& shape, std::optional<Scalar> type) override {
    const std::vector<double> garbage(static_cast<size_t>(count(shape)), -7);
    outputs.emplace_back(type.value_or(Scalar::kF32), shape, contiguous(shape), garbage, false);
    return outputs.back().data();
  }

 private:
  const Tensor& input(const std::string& name) {
    const auto found = inputs_.find(name);
    return found != inputs_.end() ? found->second : inputs_.emplace(name, make(name)).first->second;
  }

  Tensor make(const std::string& name) {
    const Shape of_k = with_last(positions_, k_), of_m = with_last(positions_, m_);
    const int64_t vocab_size = vocab_size_;
    if (name.ends_with("logits")) return make_logits();
    if (name == "mask")
      return make_tensor(random_, static_cast<Scalar>(random_.integer(0, 9)), positions_, false,
                         [&] { return random_.chance(.7); });
    if (name == "drift")
      return make_tensor(random_, Scalar::kBool, positions_, false, [&] { return random_.chance(.4); });
    if (name == "token_ids" && op_name_ == "row_stats") return make_ids(of_m, true, -2, vocab_size - 1);
    if (name == "token_ids")
      return make_ids(positions_, false, -2, op_name_ == "reliability_from_topk" ? 2 * k_ : vocab_size + 1);
    if (name == "cu_seqlens") {
      size_t b = 0;
      return make_tensor(random_, random_.pick(kIdTypes), {static_cast<int64_t>(starts_.size())}, false,
                         [&] { return static_cast<double>(starts_[b++]); });
    }
    if (name == "drift_count")
      return make_tensor(random_, Scalar::kI32, {static_cast<int64_t>(starts_.size()) - 1}, false,
                         [&] { return random_.integer(0, 90); });
    if (name == "weight")
      return make_tensor(random_, random_.pick(kRealTypes), positions_, false, [&] {
        return random_.chance(.2) ? 0 : random_.chance(.03) ? naive::kNaN : random_.integer(-4, 6) / 4.0;
      });
    if (name.ends_with("_topk_logprobs"))
      return make_tensor(random_, random_.pick(kRealTypes), of_k, true, [&] {
        return random_.chance(.1)             ? -naive::kInf
               : wild_ && random_.chance(.05) ? naive::kNaN
                                              : -random_.integer(1, 64) / 8.0;
      });
    return make_topk_ids(of_k);
  }

  /// Rows may have gaps and lie backwards. The ids beyond the vocabulary have the largest logits.
  Tensor make_logits() {
    if (!row_ || random_.chance(.7)) row_ = &kRows[static_cast<size_t>(random_.integer(0, std::ssize(kRows) - 1))];
    const RowKind& row = *row_;
    const int64_t width = vocab_size_ + (random_.chance(.3) ? random_.integer(1, 40) : 0);
    int64_t v = 0;
    what += std::string(" ") + row.name;
    return make_tensor(
        random_, random_.pick<Scalar>({Scalar::kF32, Scalar::kF32, Scalar::kBF16, Scalar::kF16}),
        with_last(positions_, width), true, [&] { return row.logit(random_, v++ % width, width); }, /*adjacent=*/true);
  }

  /// Some are padding, many occur more than once, and in a few calls some do not exist or need more than 32 bits.
  Tensor make_ids(const Shape& shape, bool rows, int64_t low, int64_t high) {
    const Scalar type = random_.pick<Scalar>({Scalar::kI32, Scalar::kI64});
    const bool astray = random_.chance(.2);
    return make_tensor(random_, type, shape, rows, [&]() -> double {
      const int64_t id = random_.integer(low, high);
      if (!astray || random_.chance(.9)) return static_cast<double>(id);
      return static_cast<double>(type == Scalar::kI64 ? id + (int64_t{1} << 32)
                                                      : random_.pick<int64_t>({high + 1, INT32_MAX}));
    });
  }

  /// A row has no id twice, except padding. Few ids, so that both sides share some.
  Tensor make_topk_ids(const Shape& shape) {
    const Scalar type = random_.pick(kIdTypes);
    const bool astray = random_.chance(.2);
    std::vector<int64_t> ids(static_cast<size_t>(3 * k_));
    std::iota(ids.begin(), ids.end(), 0);
    int64_t slot = 0;
    return make_tensor(random_, type, shape, true, [&]() -> double {
      if (slot++ % k_ == 0) std::shuffle(ids.begin(), ids.end(), random_.engine);
      const int64_t id = ids[static_cast<size_t>((slot - 1) % k_)];
      if (random_.chance(.1)) return -1;
      if (!astray || random_.chance(.9)) return static_cast<double>(id);
      return static_cast<double>(type == Scalar::kI64 ? id + (int64_t{1} << 32) : INT32_MAX - id);
    });
  }

  std::string op_name_;
  Random random_;
  const RowKind* row_ = nullptr;  // of the last logits
  int64_t vocab_size_, k_, m_;
  bool packed_, top_p_, wild_;
  Shape positions_;
  std::vector<int64_t> starts_;
  std::map<std::string, Tensor> inputs_;
  std::map<std::string, bool> given_, flags_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::string> texts_;
};

/// Compares the outputs of a call with the oracle's. The backward pass tests the state.
inline void check_outputs(const std::string& where, const RandomCall& call, const std::vector<Tensor>& want) {
  const size_t states = call.has_state();
  for (size_t n = 0; n + states < want.size(); ++n) {
    // Results along a response are exact, and so is an overlap.
    const bool exact = (call.what.starts_with("reliability") || call.what.starts_with("opd_scores")) && n < 7;
    const View &got = call.outputs[n].view, &expected = want[n].view;
    const double tolerance = !exact && (got.type == Scalar::kF32 || got.type == Scalar::kF64) ? kTolerance : 0;
    for (int64_t i = 0; i < got.at.count(); ++i) {
      if (close(naive::value(got, i), naive::value(expected, i), tolerance)) continue;
      report(where, " ", call.what, ": output ", n, "[", i, "] is ", naive::value(got, i), ", not ",
             naive::value(expected, i));
      break;
    }
  }
}

inline void check_same_bits(const std::string& where, const std::vector<Tensor>& got, const std::vector<Tensor>& want) {
  for (size_t n = 0; n < want.size(); ++n) {
    const size_t bytes = static_cast<size_t>(got[n].view.at.count()) * item_size(got[n].view.type);
    if (std::memcmp(got[n].data(), want[n].data(), bytes) != 0) report(where, ": output ", n, " has other bits");
  }
}

// ---- Backward passes.

/// Copies the first `columns` of each position's saved row to other strides, against a guard page.
inline Tensor moved(Random& random, const double* saved, int64_t positions, int64_t each, int64_t columns) {
  int64_t n = 0;
  return make_tensor(random, Scalar::kF64, {positions, columns}, true, [&] {
    const int64_t at = n++;
    return saved[at / columns * each + at % columns];
  });
}

/// Compares a gradient with the oracle's: within a rounding of its type, and one of float32 where terms cancel.
inline void check_gradient(const std::string& where, const Tensor& gradient, int64_t vocab_size,
                           const naive::Gradients& want) {
  const Scalar type = gradient.view.type;
  const double epsilon = type == Scalar::kBF16 ? 0x1p-8 : type == Scalar::kF16 ? 0x1p-11 : 0x1p-24;
  const double most = type == Scalar::kF16 ? 65504 : std::numeric_limits<float>::max();
  const double least = type == Scalar::kF16 ? 0x1p-25 : std::numeric_limits<float>::min();
  const auto in_range = [&](double x) { return std::isnan(x) ? x : std::clamp(x, -most, most); };
  for (size_t n = 0; n < want.rows.size(); ++n)
    for (size_t v = 0; v < want.rows[n].size(); ++v) {
      const double exact = want.rows[n][v],
                   got = naive::value(gradient.view, static_cast<int64_t>(n), static_cast<int64_t>(v));
      const double error = 1.01 * epsilon * std::abs(exact) + kTolerance / 10 * want.terms[n] + least;
      if (static_cast<int64_t>(v) >= vocab_size ? got == 0
          : std::isnan(exact)                   ? std::isnan(got)
                                                : std::abs(in_range(got) - in_range(exact)) <= error)
        continue;
      return report(where, ": gradient[", n, "][", v, "] is ", got, ", not ", exact, "; its terms are ", want.terms[n]);
    }
}

inline Tensor new_gradient(const Logits& student, int64_t positions, int64_t width) {
  const std::vector<double> garbage(static_cast<size_t>(positions * width), -7);
  return Tensor(student.rows.type, {positions, width}, {width, 1}, garbage, true);
}

/// Makes the factors of the gradients: 0 for positions that do not count.
inline Tensor make_scale(Random& random, const Shape& shape, const std::function<bool(int64_t)>& counts) {
  int64_t at = 0;
  const int64_t each = shape.size() == 2 ? shape[1] : 1;
  return make_tensor(random, random.pick<Scalar>({Scalar::kF32, Scalar::kF64}), shape, shape.size() == 2, [&] {
    return !counts(at++ / each) || random.chance(.1)        ? 0
           : random.chance(.02 / static_cast<double>(each)) ? random.pick<double>({naive::kNaN, naive::kInf})
           : random.chance(.05 / static_cast<double>(each)) ? random.pick<double>({1e38, 1e-30})
                                                            : random.normal();
  });
}

/// Checks logprobs_backward after a forward pass that saved `each` numbers per position; returns the gradient.
template <class Compute>
Tensor check_logprobs_backward(const std::string& where, const Logits& logits, int64_t width, const double* state,
                               int64_t each, bool has_mean, int64_t positions, uint64_t seed,
                               const std::function<bool(int64_t)>& counts, const Compute& compute) {
  Random random(seed);
  const int64_t m = random.pick<int64_t>({1, 3, 40});
  const bool of_entropy = has_mean && random.chance(.5), of_ids = !of_entropy || random.chance(.5);
  const Tensor ids = make_tensor(random, random.pick(kIdTypes), {positions, m}, true,
                                 [&] { return static_cast<double>(random.integer(-1, logits.vocab_size)); });
  const Tensor coefficients = make_scale(random, {positions, m}, [&](int64_t n) { return of_ids && counts(n); });
  const Tensor entropy = make_scale(random, {positions}, counts);
  const Tensor saved = moved(random, state, positions, each, kRowState);
  const Tensor gradient = new_gradient(logits, positions, width);
  const LogprobsBackwardArgs args{
      logits,    ids.view, coefficients.view, saved.view, of_entropy ? entropy.view : View{},
      positions, m,        gradient.data(),   width};
  compute(args);
  check_gradient(where, gradient, logits.vocab_size, naive::backward(args));
  return gradient;
}

template <class Compute>
Tensor check_divergence_backward(const std::string& where, const Logits& student, const Logits& teacher, int64_t width,
                                 const double* state, int64_t positions, uint64_t seed,
                                 const std::function<double(int64_t)>& weight, const Compute& compute) {
  Random random(seed);
  const Tensor scale = make_scale(random, {positions}, [&](int64_t n) { return weight(n) != 0; });
  const Tensor saved = moved(random, state, positions, kDivergenceState, kDivergenceState);
  const Tensor gradient = new_gradient(student, positions, width);
  const ReverseKlBackwardArgs args{student, teacher, saved.view, scale.view, positions, gradient.data(), width};
  compute(args);
  check_gradient(where, gradient, student.vocab_size, naive::backward(args, weight));
  return gradient;
}

/// Checks the backward pass on what the forward pass saved; returns the gradients.
template <class Args, class Compute>
std::vector<Tensor> check_backward(const std::string& where, const Args& args, int64_t width, uint64_t seed,
                                   const Compute& compute) {
  const auto valid = [&](int64_t n) { return naive::valid(args.mask, n); };
  if constexpr (std::is_same_v<Args, RowStatsArgs>) {
    return {check_logprobs_backward(where, args.logits, width, args.out.state, kRowState, args.entropy, args.positions,
                                    seed, valid, compute)};
  } else if constexpr (std::is_same_v<Args, ReverseKlArgs>) {
    return {check_divergence_backward(
        where, args.student, args.teacher, width, args.out.state, args.positions, seed,
        [&](int64_t n) { return naive::weight_of(args, n); }, compute)};
  } else if constexpr (std::is_same_v<Args, OpdScoresArgs>) {
    const int64_t positions = args.responses.positions;
    if (args.divergence)  // a KL of any size is finite in float64
      return {check_divergence_backward(
          where, args.student, args.teacher, width, args.out.state, positions, seed,
          [&](int64_t n) { return valid(n) ? 1e-30 : 0; }, compute)};
    return {check_logprobs_backward(where, args.student, width, args.out.state, kDivergenceState, false, positions,
                                    seed, valid, compute)};
  }
  return {};
}

/// One random call of an operator, and the backward pass of a loss, against the oracle. `in_each_way(visit)` calls
/// visit(way, first_of_its_kind) for each way to compute it with `compute(args)`; those of a kind give the same bits.
template <class Args, class Ways, class Compute>
void check_call(RandomCall call, uint64_t seed, const Ways& in_each_way, const Compute& compute) {
  naive::compute(call.template arguments<Args>());
  const std::vector<Tensor> want = std::move(call.outputs);
  std::vector<Tensor> first;
  in_each_way([&](const std::string& way, bool first_of_its_kind) {
    const Args args = call.template arguments<Args>();
    compute(args);
    check_outputs(way, call, want);
    for (Tensor& gradient : check_backward(way + " " + call.what, args, call.width(), seed, compute))
      call.outputs.push_back(std::move(gradient));
    if (first_of_its_kind)
      first = call.outputs;
    else
      check_same_bits(way + " " + call.what, call.outputs, first);
  });
}

/// No values of cu_seqlens lead outside the outputs.
template <class Compute>
void check_lying_layouts(const Compute& compute) {
  Random random(7);
  const int64_t positions = 9;
  const Tensor drift = make_tensor(random, Scalar::kBool, {positions}, false, [&] { return random.chance(.5); });
  const Tensor x = make_tensor(random, Scalar::kF32, {positions, 7}, true, [&] { return random.normal(); }, true);
  for (const std::vector<double>& starts : std::vector<std::vector<double>>{
           {0, 9}, {-5, 30}, {9, 0}, {7, 3, 12}, {INT32_MIN, INT32_MAX}, {INT32_MAX, INT32_MIN}, {4, 4, 4}, {0}}) {
    const auto size = static_cast<int64_t>(starts.size());
    const Tensor cu_seqlens(random.pick(kIdTypes), {size}, {1}, starts, false);
    const Responses responses{size - 1, positions, cu_seqlens.view};
    std::vector<float> floats(5 * positions);
    std::vector<int32_t> counts(positions), lengths(starts.size());
    std::vector<int64_t> ids(2 * positions);
    bool drifts[positions];
    const ScanOutputs scan{counts.data(), floats.data(), floats.data() + positions, lengths.data()};
    compute(ReliabilityFromDriftArgs{drift.view, View{}, responses, ScanRule{}, scan});
    for (const int32_t length : lengths) CHECK(length >= 0 && length <= positions);
    ReliabilityArgs reliability;
    reliability.student = reliability.teacher = {x.view, 1, 7};
    reliability.responses = responses;
    reliability.k = 2;
    reliability.out = {floats.data() + 2 * positions, drifts, scan, ids.data(), floats.data() + 3 * positions};
    compute(reliability);
  }
}
