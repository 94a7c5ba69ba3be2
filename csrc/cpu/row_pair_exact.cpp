#include <cmath>
#include <limits>

#include "row_pass.h"
#include "scalars.h"

namespace pruneopd {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// What decides whether a row is broken.
struct Extremes {
  double max = -kInfinity;
  bool has_nan = false;

  bool broken() const { return has_nan || max == kInfinity || max == -kInfinity; }
};

template <class T>
Extremes extremes_of(const T* row, int64_t vocab_size) {
  Extremes out;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double logit = to_float(row[i]);
    if (std::isnan(logit)) out.has_nan = true;
    if (logit > out.max) out.max = logit;
  }
  return out;
}

template <class T>
void select(const T* row, int64_t vocab_size, int64_t k, Candidate* candidates, int64_t capacity) {
  Candidate kth = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const Candidate candidate = make_candidate(to_float(row[i]), static_cast<uint32_t>(i));
    if (candidate < kth) continue;
    candidates[count++] = candidate;
    if (count == capacity) {
      keep_best(candidates, count, k);
      count = k;
      kth = candidates[k - 1];  // nth_element leaves the k-th best in its place
    }
  }
  keep_best(candidates, count, k);
  sort_candidates(candidates, k);
}

template <class T>
RowSummary summarize(const T* row, double temperature, const Extremes& extremes, int64_t vocab_size) {
  if (extremes.broken()) return {extremes.has_nan ? kNaN : extremes.max, kNaN, true};
  double mass = 0, own = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double t = (to_float(row[i]) - extremes.max) / temperature, e = std::exp(t);
    mass += e;
    if (e > 0) own += e * t;
  }
  return {extremes.max / temperature + std::log(mass), std::log(mass) - own / mass, false};
}

/// KL(p‖q) with both temperatures taken, from the definition. The differences are taken relative to each row's maximum.
template <class TP, class TQ>
double kl_exact(const TP* p_row, const TQ* q_row, const Row& p, const Row& q, double p_max, double q_max, double p_lse,
                double q_lse, int64_t vocab_size) {
  const double p_rest = p_lse - p_max / p.temperature, q_rest = q_lse - q_max / q.temperature;
  double kl = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double x = to_float(p_row[i]), y = to_float(q_row[i]);
    if (x == -kInfinity) continue;
    if (y == -kInfinity) return kInfinity;
    const double log_p = (x - p_max) / p.temperature - p_rest, log_q = (y - q_max) / q.temperature - q_rest;
    const double mass = std::exp(log_p);
    if (mass > 0) kl += mass * (log_p - log_q);
  }
  return kl < 0 ? 0 : kl;
}

}  // namespace

RowPairSummary row_pair_exact(const Row& student, const Row& teacher, int64_t vocab_size, int64_t k, bool stats,
                              RowScratch& scratch) {
  RowPairSummary out;
  with_logits(student.logits, student.type, [&](auto x) {
    with_logits(teacher.logits, teacher.type, [&](auto y) {
      const Extremes s = extremes_of(x, vocab_size), t = extremes_of(y, vocab_size);
      out.student = summarize(x, student.temperature, s, vocab_size);
      out.teacher = summarize(y, teacher.temperature, t, vocab_size);
      if (stats) {
        const bool broken = out.broken();
        out.reverse_kl = broken ? kNaN
                                : kl_exact(x, y, student, teacher, s.max, t.max, out.student.lse, out.teacher.lse, vocab_size);
        out.forward_kl = broken ? kNaN
                                : kl_exact(y, x, teacher, student, t.max, s.max, out.teacher.lse, out.student.lse, vocab_size);
      }
      select(x, vocab_size, k, scratch.student_candidates, scratch.capacity);
      select(y, vocab_size, k, scratch.teacher_candidates, scratch.capacity);
    });
  });
  return out;
}

}  // namespace pruneopd
