#include <cmath>
#include <limits>

#include "candidates.h"
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
      kth = keep_best(candidates, count, k);
      count = k;
    }
  }
  if (count > k) keep_best(candidates, count, k);
  sort_candidates(candidates, k);
}

template <class T>
RowSummary summarize(const T* row, double temperature, const Extremes& extremes, int64_t vocab_size) {
  if (extremes.broken()) return RowSummary::of_broken(extremes.has_nan ? kNaN : extremes.max);
  double mass = 0, own = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    const double t = (to_float(row[i]) - extremes.max) / temperature, e = std::exp(t);
    mass += e;
    if (e > 0) own += e * t;
  }
  return RowSummary(extremes.max, std::log(mass), std::log(mass) - own / mass, temperature);
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

RowPairSummary row_pair_exact(const Row& student, const Row& teacher, int64_t vocab_size, int64_t k, bool stats,
                              RowScratch& scratch) {
  RowPairSummary out;
  with_logits(student.logits, student.type, [&](auto x) {
    with_logits(teacher.logits, teacher.type, [&](auto y) {
      const Extremes s = extremes_of(x, vocab_size), t = extremes_of(y, vocab_size);
      out.student = summarize(x, student.temperature, s, vocab_size);
      out.teacher = summarize(y, teacher.temperature, t, vocab_size);
      if (stats) {
        const RowSummary &p = out.student, &q = out.teacher;
        const double p_temperature = student.temperature, q_temperature = teacher.temperature;
        out.reverse_kl = out.broken() ? kNaN : kl_exact(x, y, p, q, p_temperature, q_temperature, vocab_size);
        out.forward_kl = out.broken() ? kNaN : kl_exact(y, x, q, p, q_temperature, p_temperature, vocab_size);
      }
      select(x, vocab_size, k, scratch.student_candidates, scratch.capacity);
      select(y, vocab_size, k, scratch.teacher_candidates, scratch.capacity);
    });
  });
  return out;
}

}  // namespace pruneopd
