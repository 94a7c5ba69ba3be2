// The CUDA losses and their backward passes on the random cases of the operators, in several orders of threads and
// blocks, with rows whole and split over blocks, to the same last bit. The tests of Python hold the numbers to the
// definition; here it is what must hold of any: a softmax's gradient sums to 0, and nothing beside it is touched.
#include "../cpp/logits_cases.h"
#include "device.h"

namespace {

size_t size_of(int64_t n) { return static_cast<size_t>(n); }

Tensor numbers(Random& random, const Shape& shape, bool rows, const std::function<double()>& number) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  std::vector<double> values;
  for (int64_t n = 0; n < count; ++n) values.push_back(number());
  const Scalar type = rows ? Scalar::kF32 : random.pick<Scalar>({Scalar::kF32, Scalar::kF64});
  return Tensor(type, shape, contiguous(shape), values, rows);
}

struct LossCase {
  Case logits;
  int64_t m, width;
  Tensor ids, advantages, logprobs, weight, scale;
  bool off_policy, weighted, raised;

  Logits student() const { return {logits.student.view, logits.student_temperature, logits.vocab_size}; }
  View mask() const { return logits.masked ? logits.mask.view : View{}; }
};

LossCase make_loss_case(Random& random, const std::vector<int64_t>& widths) {
  const Case logits = make_case(random, widths);
  const int64_t n = logits.positions, m = random.pick<int64_t>({1, 5, 16, 300, 512}), most = std::max(m, logits.k);
  std::vector<double> ids;  // some twice, some padding, now and then one that does not exist
  for (int64_t j = 0; j < n * most; ++j)
    ids.push_back(static_cast<double>(random.chance(.1)     ? -1
                                      : random.chance(.001) ? logits.vocab_size
                                                            : random.integer(0, logits.vocab_size - 1)));
  const auto normal = [&] { return random.chance(.1) ? 0 : random.normal(); };
  return {logits,
          m,
          logits.vocab_size + (random.chance(.5) ? random.integer(0, 40) : 0),
          Tensor(random.pick<Scalar>({Scalar::kI32, Scalar::kI64}), {n, most}, {most, 1}, ids, true),
          numbers(random, {n, most}, true, normal),
          numbers(random, {n, most}, true, [&] { return random.chance(.1) ? -naive::kInf : -std::abs(normal()); }),
          numbers(random, {n}, false, normal),
          Tensor(Scalar::kF32, {n}, {1}, std::vector<double>(size_of(n), 1.0), false),
          random.chance(.5),
          random.chance(.5),
          random.chance(.5)};
}

/// What a call gives, all of it as bytes.
struct Answer {
  static constexpr size_t kAround = 64;
  std::vector<std::vector<float>> floats;
  std::vector<int64_t> ids;
  std::vector<unsigned char> memory;  // of the gradient, with something around it

  float* of_positions(int64_t count) { return floats.emplace_back(size_of(count), -7.0f).data(); }
  int64_t* topk_ids(int64_t count) {
    ids.assign(size_of(count), -7);
    return ids.data();
  }
  /// Aligned, as memory of a device is.
  unsigned char* gradient(size_t bytes) {
    if (memory.empty()) memory.assign(bytes + 2 * kAround, 0xa5);
    return memory.data() + kAround - reinterpret_cast<uintptr_t>(memory.data()) % 16;
  }
};

View rows_of(const std::vector<float>& values, int64_t positions, int64_t each) {
  return {values.data(), Scalar::kF32, Positions(&positions, &each, 1), 1};
}

/// Of each row: its sum is 0 but for rounding, or it is NaN in every id that exists.
void check_gradient(const std::string& where, const LossCase& c, Answer& answer, size_t bytes) {
  const Scalar type = c.logits.student.view.type;
  const int64_t count = c.logits.positions * c.width, stride = 1;
  unsigned char* const data = answer.gradient(bytes);
  const View gradient{data, type, Positions(&count, &stride, 1)};
  for (int64_t n = 0; n < c.logits.positions; ++n) {
    double sum = 0, size = 0;
    int64_t nans = 0;
    for (int64_t v = 0; v < c.width; ++v) {
      const double x = naive::value(gradient, n * c.width + v);
      nans += std::isnan(x);
      sum += x;
      size += std::abs(x);
      if (v >= c.logits.vocab_size && x != 0) return report(where, ": a gradient beyond the vocabulary");
    }
    const double rounding = type == Scalar::kF32 ? 1e-5 : 1e-2;
    const bool overflows = size == naive::kInf;  // in float16
    if (nans ? nans != c.logits.vocab_size : !overflows && !(std::abs(sum) <= rounding * (size + 1)))
      return report(where, ": the gradient of row ", n, " sums to ", sum, " of ", size, ", with ", nans, " NaN");
  }
  for (size_t i = 0; i < answer.memory.size(); ++i) {
    const unsigned char* const at = answer.memory.data() + i;
    if ((at < data || at >= data + bytes) && *at != 0xa5) return report(where, ": written beside the gradient");
  }
}

/// Runs forward and backward by the settings of case n: `run(answer, gradient)`.
template <class Run>
void check_case(int n, const char* op, const LossCase& c, const Run& run) {
  const size_t bytes = size_of(c.logits.positions * c.width) * item_size(c.logits.student.view.type);
  Answer first;
  int number = 0;
  for (const emulator::Settings& settings : settings_of(n)) {
    emulator::settings = settings;
    const std::string where =
        std::string(op) + " #" + std::to_string(n) + " " + c.logits.what + " by settings " + std::to_string(number);
    Answer answer;
    run(answer, answer.gradient(bytes));
    check_gradient(where, c, answer, bytes);
    if (number++ == 0) {
      first = std::move(answer);
      continue;
    }
    for (size_t f = 0; f < first.floats.size(); ++f) check_bits(where, "an output", answer.floats[f], first.floats[f]);
    check_bits(where, "student_topk_ids", answer.ids, first.ids);
    if (std::memcmp(answer.gradient(bytes), first.gradient(bytes), bytes) != 0) report(where, ": another gradient");
  }
}

void backward(const LossCase& c, const View& ids, int64_t m, const std::vector<float>& coefficients,
              const std::vector<float>& state, void* gradient) {
  const int64_t n = c.logits.positions;
  compute(LogprobsBackwardArgs{c.student(), ids, rows_of(coefficients, n, m), rows_of(state, n, kRowState),
                               c.scale.view, n, m, gradient, c.width});
}

void check_policy(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const LossCase c = make_loss_case(random, widths);
    const int64_t positions = c.logits.positions;
    check_case(n, "topk_policy_loss", c, [&](Answer& answer, void* gradient) {
      answer.floats.reserve(3);
      compute(TopkPolicyLossArgs{c.student(), c.ids.view, c.advantages.view, c.off_policy ? c.logprobs.view : View{},
                                 c.mask(), positions, c.m, .2, .2, 3, answer.of_positions(positions),
                                 answer.of_positions(positions * c.m), answer.of_positions(positions * kRowState)});
      backward(c, c.ids.view, c.m, answer.floats[1], answer.floats[2], gradient);
    });
  }
}

void check_forward_kl(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const LossCase c = make_loss_case(random, widths);
    const int64_t positions = c.logits.positions, k = c.logits.k;
    check_case(n, "topk_forward_kl", c, [&](Answer& answer, void* gradient) {
      answer.floats.reserve(7);
      float* of_position[5];
      for (float*& output : of_position) output = answer.of_positions(positions);
      float *const coefficients = answer.of_positions(positions * k), *const state =
                                                                          answer.of_positions(positions * kRowState);
      compute(TopkForwardKlArgs{c.student(), c.ids.view, c.logprobs.view, c.mask(), positions, k,
                                c.raised ? -5 : -naive::kInf, of_position[0], of_position[1], of_position[2],
                                of_position[3], of_position[4], answer.topk_ids(positions * k), coefficients, state});
      for (int64_t p = 0; p < positions; ++p)
        if (naive::valid(c.mask(), p)) {
          const naive::Row row = naive::row(c.logits.student.view, p, c.logits.vocab_size, k, 1);
          const auto got = answer.ids.begin() + p * k;
          CHECK(std::equal(row.topk.begin(), row.topk.end(), got));
          std::vector<int64_t> teacher;
          for (int64_t j = 0; j < k; ++j) teacher.push_back(naive::id(c.ids.view, p, j));
          const double common = row.broken ? 0 : static_cast<double>(naive::common(row.topk, teacher));
          CHECK(answer.floats[3][size_of(p)] == static_cast<float>(common / static_cast<double>(k)));
        }
      backward(c, c.ids.view, k, answer.floats[5], answer.floats[6], gradient);
    });
  }
}

void check_reverse_kl(uint64_t seed, int count, const std::vector<int64_t>& widths) {
  Random random(seed);
  for (int n = 0; n < count; ++n) {
    const LossCase c = make_loss_case(random, widths);
    const int64_t positions = c.logits.positions;
    const LogitsPair pair = c.logits.pair();
    std::vector<float> want(size_of(positions), 0.0f);
    for (int64_t p = 0; p < positions; ++p) {
      const double weight = c.weighted ? naive::value(c.weight.view, p) : 1;
      if (!naive::valid(c.mask(), p) || weight == 0) continue;
      const auto row_of = [&](const View& view, double t) { return naive::row(view, p, pair.vocab_size, 1, t); };
      want[size_of(p)] = static_cast<float>(weight * naive::kl(row_of(pair.student, pair.student_temperature),
                                                               row_of(pair.teacher, pair.teacher_temperature)));
    }
    check_case(n, "reverse_kl", c, [&](Answer& answer, void* gradient) {
      answer.floats.reserve(2);
      compute(ReverseKlArgs{pair, c.mask(), c.weighted ? c.weight.view : View{}, positions,
                            answer.of_positions(positions), answer.of_positions(positions * kDivergenceState)});
      check_equal(c.logits.what, "loss", answer.floats[0], want, kTolerance);
      // Where a position does not count its scale is 0.
      std::vector<float> scale(size_of(positions));
      for (int64_t p = 0; p < positions; ++p)
        scale[size_of(p)] = naive::valid(c.mask(), p) && !(c.weighted && naive::value(c.weight.view, p) == 0);
      const int64_t stride = 1;
      compute(ReverseKlBackwardArgs{pair, rows_of(answer.floats[1], positions, kDivergenceState),
                                    View{scale.data(), Scalar::kF32, Positions(&positions, &stride, 1)}, positions,
                                    gradient, c.width});
    });
  }
}

TEST(topk_policy_losses_and_their_gradients) { check_policy(21, some(100), kWidths); }
TEST(topk_policy_losses_of_wide_rows) { check_policy(22, some(15), kWideWidths); }
TEST(topk_forward_kls_and_their_gradients) { check_forward_kl(23, some(100), kWidths); }
TEST(topk_forward_kls_of_wide_rows) { check_forward_kl(24, some(15), kWideWidths); }
TEST(reverse_kls_and_their_gradients) { check_reverse_kl(25, some(100), kWidths); }
TEST(reverse_kls_of_wide_rows) { check_reverse_kl(26, some(15), kWideWidths); }

}  // namespace
