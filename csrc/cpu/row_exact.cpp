#include <algorithm>
#include <cmath>
#include <limits>

#include "candidates.h"
#include "row_pass.h"
#include "scalars.h"

namespace pruneopd {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
void select(const T* row, int64_t vocab_size, int64_t k, Candidate* candidates, int64_t capacity) {
  Candidate kth = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const Candidate candidate = make_candidate(to_float(row[i]), static_cast<uint32_t>(i));
    if (candidate < kth) continue;
    candidates[count++] = candidate;
    if (count == capacity) {
      kth = keep_best(candidates, count, k);
      count = k;
    }
  }
  if (count > k) keep_best(candidates, count, k);
  sort_candidates(candidates, k);
}

/// The summary of a row, and its k best.
template <class T>
RowSummary summarize(const T* row, double temperature, int64_t vocab_size, int64_t k, Candidate* candidates,
                     int64_t capacity) {
  if (k > 0) select(row, vocab_size, k, candidates, capacity);
  double max = -kInfinity;
  bool has_nan = false;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double logit = to_float(row[i]);
    has_nan |= std::isnan(logit);
    if (logit > max) max = logit;
  }
  if (has_nan || std::isinf(max)) return RowSummary::of_broken(has_nan ? kNaN : max);
  double mass = 0, own = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double t = (to_float(row[i]) - max) / temperature, e = std::exp(t);
    mass += e;
    if (e > 0) own += e * t;
  }
  return RowSummary(max, std::log(mass), own / mass, temperature);
}

/// KL(p‖q) by its definition.
template <class TP, class TQ>
double kl_exact(const TP* p_row, const TQ* q_row, const RowSummary& p, const RowSummary& q, double p_temperature,
                double q_temperature, int64_t vocab_size) {
  double kl = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double log_p = p.logprob(to_float(p_row[i]), p_temperature),
                 log_q = q.logprob(to_float(q_row[i]), q_temperature);
    if (log_p == -kInfinity) continue;
    if (log_q == -kInfinity) return kInfinity;
    const double mass = std::exp(log_p);
    if (mass > 0) kl += mass * (log_p - log_q);
  }
  return kl < 0 ? 0 : kl;
}

}  // namespace

RowSummary row_exact(const Row& row, int64_t vocab_size, int64_t k, bool mean, RowScratch& scratch) {
  RowSummary summary = with_logits(row.logits, row.type, [&](auto x) {
    return summarize(x, row.temperature, vocab_size, k, scratch.student_candidates, scratch.capacity);
  });
  if (!mean && !summary.broken) summary.mean = 0;
  return summary;
}

RowPairSummary row_pair_exact(const Row& student, const Row& teacher, int64_t vocab_size, int64_t k, Sums sums,
                              RowScratch& scratch) {
  RowPairSummary out;
  with_logits(student, teacher, [&](auto x, auto y) {
    const double p_temperature = student.temperature, q_temperature = teacher.temperature;
    const RowSummary p = out.student =
        summarize(x, p_temperature, vocab_size, k, scratch.student_candidates, scratch.capacity);
    const RowSummary q = out.teacher =
        summarize(y, q_temperature, vocab_size, k, scratch.teacher_candidates, scratch.capacity);
    if (sums == Sums::kMass) return;
    out.reverse_kl = out.forward_kl = kNaN;
    if (out.broken()) return;
    out.reverse_kl = kl_exact(x, y, p, q, p_temperature, q_temperature, vocab_size);
    out.forward_kl = kl_exact(y, x, q, p, q_temperature, p_temperature, vocab_size);
    const auto* const peak =
        std::find_if(x, x + vocab_size, [&](auto logit) { return to_float(logit) == p.reference; });
    out.peak_excess =
        p.logprob(p.reference, p_temperature) - q.logprob(to_float(y[peak - x]), q_temperature) - out.reverse_kl;
  });
  return out;
}

void softmax_gradient_exact(const Row& row, int64_t vocab_size, const RowState& state, double total, double entropy,
                            void* out) {
  with_logits(row.logits, row.type, [&]<class T>(const T* x) {
    for (int64_t i = 0; i < vocab_size; ++i) {
      const double gradient = softmax_gradient(to_float(x[i]), state, row.temperature, total, entropy);
      static_cast<T*>(out)[i] = from_float<T>(static_cast<float>(gradient));
    }
  });
}

void divergence_gradient_exact(const Row& student, const Row& teacher, int64_t vocab_size, const DivergenceState& state,
                               double factor, void* out) {
  with_logits(student, teacher, [&]<class T>(const T* x, auto y) {
    for (int64_t i = 0; i < vocab_size; ++i) {
      const double gradient =
          divergence_gradient(to_float(x[i]), to_float(y[i]), state, student.temperature, teacher.temperature);
      static_cast<T*>(out)[i] = from_float<T>(static_cast<float>(factor * gradient));
    }
  });
}

}  // namespace pruneopd
