// What is known of one row, or of a pair of rows, after the row pass: the sums of a softmax relative to a reference,
// and the statistics that follow from them.
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"

namespace pruneopd {

constexpr double kLn2 = 0.693147180559945309417232121458176568;

/// Sums over a row of m = exp2(scale * d), where d = logit - reference: of m, of m * d, and of m * (the other row's d).
struct RowSums {
  double reference = 0;  // in logits
  double scale = 1;      // log2(e) / temperature, as rounded for the sums
  double mass = 0, own = 0, other = 0;

  PRUNEOPD_FORMULA double log2_mass() const { return log2(mass); }
};

/// KL(p || q) in nats of p's sums against q's; never below 0, NaN stays NaN.
PRUNEOPD_FORMULA double kl_divergence(const RowSums& p, const RowSums& q) {
  const double kl = kLn2 * ((p.scale * p.own - q.scale * p.other) / p.mass - p.log2_mass() + q.log2_mass());
  return kl < 0 ? 0 : kl;
}

/// What a trainer is told about one row.
struct RowSummary {
  double reference = 0;  // a logit, NaN where the row is broken
  double log_mass = 0;   // logsumexp(logits / temperature) - reference / temperature
  double mean = 0;       // of (logit - reference) / temperature under the softmax; 0 where it is not summed
  bool broken = false;   // a NaN, a +inf, or no finite logit
  double lse = 0;

  RowSummary() = default;
  PRUNEOPD_FORMULA RowSummary(double reference, double log_mass, double mean, double temperature)
      : reference(reference), log_mass(log_mass), mean(mean), lse(reference / temperature + log_mass) {}
  /// Dividing by the rounded `scale` undoes its rounding.
  PRUNEOPD_FORMULA RowSummary(const RowSums& sums, double temperature)
      : RowSummary(sums.reference, sums.log2_mass() / (sums.scale * temperature), sums.own / sums.mass / temperature,
                   temperature) {}

  PRUNEOPD_FORMULA static RowSummary of_broken(double lse) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    RowSummary summary(nan, nan, nan, 1);
    summary.broken = true;
    summary.lse = lse;
    return summary;
  }

  /// The same, referring to a logit of the row.
  PRUNEOPD_FORMULA RowSummary relative_to(double logit, double temperature) const {
    RowSummary summary = *this;
    if (broken) return summary;
    const double shift = (reference - logit) / temperature;
    summary.log_mass += shift;
    summary.mean += shift;
    summary.reference = logit;
    return summary;
  }

  /// In nats, where the mean is summed.
  PRUNEOPD_FORMULA double entropy() const { return log_mass - mean; }

  /// log-probability of a logit of this row. The reference goes first: beside a huge one the mass would vanish.
  PRUNEOPD_FORMULA double logprob(double logit, double temperature) const {
    return (logit - reference) / temperature - log_mass;
  }
};

}  // namespace pruneopd
