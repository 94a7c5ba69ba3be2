// The losses and their gradients written as plainly as possible, in float64 and from the definitions alone: nothing
// here knows what a forward pass saves for the backward pass.
#pragma once

#include "naive.h"

namespace naive {

/// What the losses of a batch are, and their gradients times a scale.
struct Losses {
  std::vector<double> loss;
  std::vector<std::vector<double>> coefficients;  // by log-probability of a candidate
  std::vector<std::vector<double>> gradients;     // by logit, as wide as the logits
  std::vector<double> terms;                      // how large the numbers that a gradient is a difference of; 0 for NaN
};

/// The derivative by every logit of sum(coefficients * log p[ids]).
inline std::vector<double> through_softmax(const Row& p, double temperature, const std::vector<int64_t>& ids,
                                           const std::vector<double>& coefficients) {
  std::vector<double> gradient;
  const double total = std::accumulate(coefficients.begin(), coefficients.end(), 0.0);
  for (const double logprob : p.logprobs) gradient.push_back(-total * std::exp(logprob) / temperature);
  for (size_t j = 0; j < ids.size(); ++j)
    if (ids[j] >= 0 && ids[j] < static_cast<int64_t>(gradient.size()))
      gradient[static_cast<size_t>(ids[j])] += coefficients[j] / temperature;
  return gradient;
}

/// Times a scale that is not 0, NaN for a loss that is not finite in float32, and 0 for ids that do not exist.
inline std::vector<double> finished(std::vector<double> gradient, double scale, double loss, int64_t width) {
  const bool spoilt = !std::isfinite(static_cast<float>(loss)) || !std::isfinite(scale);
  for (double& x : gradient) x = spoilt ? kNaN : scale * x;
  gradient.resize(static_cast<size_t>(width));
  return gradient;
}

inline bool all_zero(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double x) { return x == 0; });
}

inline double sum_of_sizes(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0, [](double sum, double x) { return sum + std::abs(x); });
}

/// One candidate: its loss, and the derivative by its log-probability.
inline std::pair<double, double> policy(double logprob, double old, double advantage, double low, double high,
                                        double dual) {
  if (advantage == 0 || logprob == -kInf) return {0, 0};
  if (std::isnan(logprob - old) || std::isnan(advantage)) return {kNaN, kNaN};
  const double ratio = std::exp(std::clamp(logprob - old, -20.0, 20.0));
  const bool moves = std::abs(logprob - old) <= 20;
  // The ratios that it moves with, and the one that it counts.
  const double least = advantage > 0 ? 0 : low, most = advantage > 0 ? high : dual;
  const double counted = advantage > 0 ? std::min(ratio, high) : std::min(std::max(ratio, low), dual);
  return {-advantage * counted, moves && ratio >= least && ratio <= most ? -advantage * ratio : 0};
}

inline Losses topk_policy_loss(const TopkPolicyLossArgs& args, const View& scale, int64_t width) {
  Losses out;
  for (int64_t n = 0; n < args.positions; ++n) {
    std::vector<int64_t> ids;
    std::vector<double> coefficients(static_cast<size_t>(args.m)), gradient(static_cast<size_t>(width));
    double loss = 0;
    bool used = false;
    for (int64_t j = 0; j < args.m; ++j) {
      ids.push_back(id(args.topk_ids, n, j));
      used |= ids.back() >= 0 && value(args.advantages, n, j) != 0;
    }
    if (used && valid(args.mask, n)) {
      const Row p = row(args.student.rows, n, args.student.vocab_size, 1, args.student.temperature);
      for (size_t j = 0; j < ids.size(); ++j) {
        if (ids[j] < 0) continue;
        const int64_t slot = static_cast<int64_t>(j);
        const double logprob = ids[j] < args.student.vocab_size ? p.logprobs[static_cast<size_t>(ids[j])] : kNaN;
        const double old = args.old_logprobs ? value(args.old_logprobs, n, slot) : logprob;
        const auto [term, derivative] = policy(logprob, old, value(args.advantages, n, slot), 1 - args.clip_low,
                                               1 + args.clip_high, args.clip_dual);
        loss += term;
        coefficients[j] = derivative;
      }
      if (!std::isfinite(static_cast<float>(loss))) coefficients.assign(coefficients.size(), kNaN);
      if (value(scale, n) != 0 && !all_zero(coefficients))
        gradient =
            finished(through_softmax(p, args.student.temperature, ids, coefficients), value(scale, n), loss, width);
    }
    out.loss.push_back(loss);
    out.coefficients.push_back(coefficients);
    out.gradients.push_back(gradient);
    out.terms.push_back(
        std::fmax(0, std::abs(value(scale, n)) * sum_of_sizes(coefficients) / args.student.temperature));
  }
  return out;
}

/// Fills the outputs that need no gradient but `loss`.
inline Losses topk_forward_kl(const TopkForwardKlArgs& args, const View& scale, int64_t width) {
  Losses out;
  for (int64_t n = 0; n < args.positions; ++n) {
    std::vector<double> coefficients(static_cast<size_t>(args.k)), gradient(static_cast<size_t>(width));
    int64_t* const topk = args.student_topk_ids + n * args.k;
    double loss = 0, student_mass = 0, teacher_mass = 0, advantage = 0, shared = 0, overlap = 0;
    std::iota(topk, topk + args.k, 0);
    if (valid(args.mask, n)) {
      const Row p = row(args.student.rows, n, args.student.vocab_size, args.k, args.student.temperature);
      std::copy(p.topk.begin(), p.topk.end(), topk);
      std::vector<int64_t> ids;
      for (int64_t j = 0; j < args.k; ++j) {
        ids.push_back(id(args.teacher_topk_ids, n, j));
        if (ids.back() < 0) continue;
        const bool exists = ids.back() < args.student.vocab_size;
        const double log_p = exists ? p.logprobs[static_cast<size_t>(ids.back())] : kNaN;
        const double log_q = value(args.teacher_topk_logprobs, n, j);
        student_mass += std::exp(log_p);
        teacher_mass += std::exp(log_q);
        const auto raised = [&](double x) { return std::isnan(x) ? kNaN : std::max(x, args.logprob_min); };
        const double a = raised(log_p), b = raised(log_q);
        const double term = std::isnan(a) || std::isnan(b) ? kNaN
                            : b == -kInf                   ? 0
                            : a == -kInf                   ? kInf
                                                           : std::exp(b) * (b - a);
        loss += term;
        if (!(log_p < args.logprob_min)) coefficients[static_cast<size_t>(j)] = -std::exp(b);
        if (std::find(p.topk.begin(), p.topk.end(), ids.back()) == p.topk.end()) continue;
        advantage -= term;
        ++shared;
      }
      overlap = p.broken ? 0 : static_cast<double>(common(p.topk, ids)) / static_cast<double>(args.k);
      advantage /= std::max(shared, 1.0);
      if (p.broken) loss = student_mass = advantage = kNaN;
      if (!std::isfinite(static_cast<float>(loss))) coefficients.assign(coefficients.size(), kNaN);
      if (value(scale, n) != 0 && !all_zero(coefficients))
        gradient =
            finished(through_softmax(p, args.student.temperature, ids, coefficients), value(scale, n), loss, width);
    }
    args.student_mass[n] = static_cast<float>(student_mass);
    args.teacher_mass[n] = static_cast<float>(teacher_mass);
    args.overlap[n] = static_cast<float>(overlap);
    args.overlap_token_advantage[n] = static_cast<float>(advantage);
    out.loss.push_back(loss);
    out.coefficients.push_back(coefficients);
    out.gradients.push_back(gradient);
    out.terms.push_back(
        std::fmax(0, std::abs(value(scale, n)) * sum_of_sizes(coefficients) / args.student.temperature));
  }
  return out;
}

/// The derivative of KL(p‖q) by p's logits: p times what log p/q exceeds its mean by. Of an id that has most of the
/// mass that is a sum of small differences, not the difference of large sums.
inline std::vector<double> through_kl(const Row& p, const Row& q, double temperature, double teacher_temperature) {
  const auto excess_of = [&](size_t v, size_t w) {  // log p/q at v less that at w
    return (p.logits[v] - p.logits[w]) / temperature - (q.logits[v] - q.logits[w]) / teacher_temperature;
  };
  const size_t peak = static_cast<size_t>(p.topk[0]);
  double mean = 0;  // of log p/q, less that at the peak
  for (size_t w = 0; w < p.logits.size(); ++w)
    if (p.logprobs[w] > -kInf) mean += std::exp(p.logprobs[w]) * excess_of(w, peak);
  std::vector<double> gradient;
  for (size_t v = 0; v < p.logits.size(); ++v) {
    const double mass = std::exp(p.logprobs[v]);
    gradient.push_back(mass == 0 ? 0 : mass * (excess_of(v, peak) - mean) / temperature);
  }
  return gradient;
}

inline Losses reverse_kl(const ReverseKlArgs& args, const View& scale, int64_t width) {
  Losses out;
  const LogitsPair& logits = args.logits;
  for (int64_t n = 0; n < args.positions; ++n) {
    const double weight = args.weight ? value(args.weight, n) : 1;
    double divergence = 0, loss = 0;
    std::vector<double> gradient(static_cast<size_t>(width));
    if (valid(args.mask, n) && weight != 0) {
      const Row p = row(logits.student, n, logits.vocab_size, 1, logits.student_temperature);
      const Row q = row(logits.teacher, n, logits.vocab_size, 1, logits.teacher_temperature);
      divergence = kl(p, q);
      loss = weight * divergence;
      if (value(scale, n) != 0)
        gradient = finished(through_kl(p, q, logits.student_temperature, logits.teacher_temperature), value(scale, n),
                            loss, width);
    }
    out.loss.push_back(loss);
    out.gradients.push_back(gradient);
    out.terms.push_back(
        std::fmax(0, std::abs(value(scale, n)) * std::max(divergence, 1.0) / logits.student_temperature));
  }
  return out;
}

}  // namespace naive
