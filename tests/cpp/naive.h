// The oracle of the C++ tests, for the CPU and CUDA: the operators from their definitions, in float64, one position at
// a time. Nothing here depends on what a forward pass saves for its backward pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "operators/list.h"

namespace naive {

using namespace pruneopd;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
double as(const void* data, int64_t n) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + n * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return static_cast<double>(value);
}

inline double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31 ? (fraction ? kNaN : kInf)
                           : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                          : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline double bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  return as<float>(&wide, 0);
}

/// Element j of position n's row, or position n's value.
inline double value(const View& view, int64_t n, int64_t j = 0) {
  const int64_t at = view.at.offset(n) + j * view.step;
  switch (view.type) {
    case Scalar::kBool: return as<uint8_t>(view.data, at) != 0;
    case Scalar::kU8: return as<uint8_t>(view.data, at);
    case Scalar::kI8: return as<int8_t>(view.data, at);
    case Scalar::kI16: return as<int16_t>(view.data, at);
    case Scalar::kI32: return as<int32_t>(view.data, at);
    case Scalar::kI64: return as<int64_t>(view.data, at);
    case Scalar::kF16: return half(static_cast<uint16_t>(as<uint16_t>(view.data, at)));
    case Scalar::kBF16: return bfloat16(static_cast<uint16_t>(as<uint16_t>(view.data, at)));
    case Scalar::kF32: return as<float>(view.data, at);
    case Scalar::kF64: return as<double>(view.data, at);
  }
  return kNaN;
}

inline int64_t id(const View& view, int64_t n, int64_t j = 0) { return static_cast<int64_t>(value(view, n, j)); }
inline bool valid(const View& mask, int64_t n) { return !mask || value(mask, n) != 0; }

struct Row {
  std::vector<double> logits, logprobs;
  std::vector<int64_t> topk;
  double lse = 0, entropy = 0;
  bool broken = false;

  /// The candidates without empty slots.
  std::vector<int64_t> filled() const {
    std::vector<int64_t> ids = topk;
    std::erase_if(ids, [&](int64_t id) { return logits[static_cast<size_t>(id)] == -kInf; });
    return ids;
  }
};

inline Row row(const Logits& logits, int64_t n, int64_t k) {
  const int64_t vocab_size = logits.vocab_size;
  const double temperature = logits.temperature;
  Row row;
  bool finite = false;
  for (int64_t v = 0; v < vocab_size; ++v) {
    row.logits.push_back(value(logits.rows, n, v));
    row.broken |= std::isnan(row.logits.back()) || row.logits.back() == kInf;
    finite |= std::isfinite(row.logits.back());
  }
  row.broken |= !finite;

  std::vector<int64_t> order(static_cast<size_t>(vocab_size));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = row.logits[static_cast<size_t>(a)], y = row.logits[static_cast<size_t>(b)];
    return std::isnan(x) ? !std::isnan(y) : x > y;
  });
  row.topk.assign(order.begin(), order.begin() + k);

  double most = -kInf, mass = 0;
  bool nan = false;
  for (const double x : row.logits) {
    nan |= std::isnan(x);
    most = std::max(most, x);
  }
  for (const double x : row.logits) mass += std::exp((x - most) / temperature);
  row.lse = nan ? kNaN : std::isinf(most) ? most : most / temperature + std::log(mass);
  row.logprobs.assign(row.logits.size(), kNaN);
  row.entropy = row.broken ? kNaN : 0;
  for (size_t v = 0; v < row.logits.size() && !row.broken; ++v) {
    row.logprobs[v] = (row.logits[v] - most) / temperature - std::log(mass);  // not by lse, which loses a small mass
    if (row.logprobs[v] > -kInf) row.entropy -= std::exp(row.logprobs[v]) * row.logprobs[v];
  }
  return row;
}

inline double kl(const Row& p, const Row& q) {
  if (p.broken || q.broken) return kNaN;
  double sum = 0;
  for (size_t v = 0; v < p.logits.size(); ++v)
    if (p.logprobs[v] > -kInf)
      sum += q.logprobs[v] == -kInf ? kInf : std::exp(p.logprobs[v]) * (p.logprobs[v] - q.logprobs[v]);
  return std::max(sum, 0.0);
}

/// Takes candidates without empty slots.
inline double overlap_of(const std::vector<int64_t>& student, const std::vector<int64_t>& teacher) {
  const auto common = std::count_if(student.begin(), student.end(), [&](int64_t id) {
    return std::find(teacher.begin(), teacher.end(), id) != teacher.end();
  });
  return common ? static_cast<double>(common) / static_cast<double>(std::max(student.size(), teacher.size())) : 0;
}

/// Whether the token is in the shortest prefix of the candidates whose mass is at least top_p - 1e-6; top_p = 1 takes
/// all candidates.
inline bool in_nucleus(const std::vector<int64_t>& ids, const std::vector<double>& logprobs, int64_t token,
                       double top_p) {
  double mass = 0;
  bool closed = false, found = false;
  for (size_t j = 0; j < ids.size(); ++j) {
    if (std::isnan(logprobs[j])) return false;
    if (closed) continue;
    found |= ids[j] == token;
    mass += std::exp(logprobs[j]);
    closed = top_p < 1 && mass >= top_p - 1e-6;
  }
  return found;
}

/// Calls visit(n) for each valid position of a range.
template <class Visit>
void for_each_valid(const View& mask, int64_t positions, const Visit& visit) {
  for (int64_t n = 0; n < positions; ++n)
    if (valid(mask, n)) visit(n);
}

/// log p of an id, NaN if it does not exist.
inline double logprob_of(const Row& row, int64_t id) {
  return id >= 0 && id < static_cast<int64_t>(row.logprobs.size()) ? row.logprobs[static_cast<size_t>(id)] : kNaN;
}

/// The first position of response b, if cu_seqlens are valid.
inline int64_t begin_of(const Responses& responses, int64_t b) {
  return responses.cu_seqlens ? id(responses.cu_seqlens, b) : b * (responses.positions / responses.count);
}

/// C, R, L and E from each position's drift.
inline void scan(const Responses& responses, const ScanRule& rule, const View& mask, const std::vector<bool>& drift,
                 const ScanOutputs& out) {
  for (int64_t b = 0; b < responses.count; ++b) {
    int64_t drifted = rule.drift_count ? id(rule.drift_count, b) : 0;
    out.effective_length[b] = 0;
    for (int64_t n = begin_of(responses, b); n < begin_of(responses, b + 1); ++n) {
      const bool here = valid(mask, n);
      drifted += here && drift[static_cast<size_t>(n)];
      const double lost = rule.w_drop * static_cast<double>(drifted);
      const double reliability = here ? std::clamp(1 - lost, 0.0, 1.0) : 0;
      out.drift_count[n] = static_cast<int32_t>(drifted);
      out.reliability[n] = static_cast<float>(reliability);
      out.weight[n] = here ? static_cast<float>(reliability + rule.w_base) : 0;
      out.effective_length[b] += here && reliability > rule.eps;
    }
  }
}

inline void compute(const ReliabilityFromDriftArgs& args) {
  std::vector<bool> drift;
  for (int64_t n = 0; n < args.responses.positions; ++n) drift.push_back(value(args.drift, n) != 0);
  scan(args.responses, args.scan_rule, args.mask, drift, args.scan);
}

inline void compute(const ReliabilityFromTopkArgs& args) {
  const int64_t positions = args.responses.positions;
  std::vector<bool> drift(static_cast<size_t>(positions));
  std::fill_n(args.out.overlap, positions, 0.0f);
  for_each_valid(args.mask, positions, [&](int64_t n) {
    std::vector<int64_t> sides[2];
    std::vector<double> masses;
    for (const int side : {0, 1}) {
      const View& ids = side ? args.teacher_topk_ids : args.student_topk_ids;
      const View& logprobs = side ? args.teacher_topk_logprobs : args.student_topk_logprobs;
      for (int64_t j = 0; j < args.k; ++j) {
        const double logprob = logprobs ? value(logprobs, n, j) : 0;
        if (id(ids, n, j) < 0 || logprob == -kInf) continue;
        sides[side].push_back(id(ids, n, j));
        if (side) masses.push_back(logprob);
      }
    }
    const double overlap = overlap_of(sides[0], sides[1]);
    args.out.overlap[n] = static_cast<float>(overlap);
    drift[static_cast<size_t>(n)] = args.drift_rule.metric == Metric::kOverlap
                                        ? overlap < args.drift_rule.threshold
                                        : !in_nucleus(sides[1], masses, id(args.token_ids, n), args.drift_rule.top_p);
  });
  std::copy(drift.begin(), drift.end(), args.out.drift);
  scan(args.responses, args.scan_rule, args.mask, drift, args.out.scan);
}

/// r of a position for the student's k candidates; 0 in empty slots, NaN beside a broken row.
inline std::vector<double> rewards_of(const Row& p, const Row& q, RewardWeight by) {
  const Row& weigher = by == RewardWeight::kTeacher ? q : p;
  const std::vector<int64_t> candidates = p.broken ? p.topk : p.filled();
  double most = -kInf, mass = 0;  // the weights are a softmax over the candidates, in which less underflows
  for (const int64_t id : candidates) most = std::max(most, logprob_of(weigher, id));
  for (const int64_t id : candidates) mass += std::exp(logprob_of(weigher, id) - most);
  std::vector<double> rewards;
  for (const int64_t id : candidates) {
    const double a = logprob_of(p, id), b = logprob_of(q, id);
    const bool none = by == RewardWeight::kNone;
    const double weight =
        none ? 1.0 / static_cast<double>(candidates.size()) : std::exp(logprob_of(weigher, id) - most) / mass;
    rewards.push_back(p.broken || q.broken     ? kNaN
                      : !none && most == -kInf ? 0
                      : a == b                 ? 0
                      : b == -kInf             ? -kInf
                                               : weight * (b - a));
  }
  rewards.resize(p.topk.size());
  return rewards;
}

inline void compute(const ReliabilityArgs& args) {
  const int64_t positions = args.responses.positions, k = args.k;
  const ReliabilityArgs::Outputs& out = args.out;
  std::vector<bool> drift(static_cast<size_t>(positions));
  std::vector<double> rewards(static_cast<size_t>(positions * k));
  std::fill_n(out.overlap, positions, 0.0f);
  for (int64_t slot = 0; slot < positions * k; ++slot) out.topk_ids[slot] = slot % k;
  for (int64_t n = 0; n < positions && out.accepted; ++n) {
    out.accepted[n] = false;
    out.student_entropy[n] = out.teacher_entropy[n] = 0;
    out.reverse_kl[n] = 0;
  }
  for_each_valid(args.mask, positions, [&](int64_t n) {
    const Row p = row(args.student, n, k), q = row(args.teacher, n, k);
    const bool broken = p.broken || q.broken;
    std::copy(p.topk.begin(), p.topk.end(), out.topk_ids + n * k);
    std::vector<double> logprobs;
    for (const int64_t id : q.filled()) logprobs.push_back(logprob_of(q, id));
    const double overlap = broken ? 0 : overlap_of(p.filled(), q.filled());
    const bool accepted =
        args.token_ids && !broken && in_nucleus(q.filled(), logprobs, id(args.token_ids, n), args.drift_rule.top_p);
    out.overlap[n] = static_cast<float>(overlap);
    const bool by_overlap = args.drift_rule.metric == Metric::kOverlap;
    drift[static_cast<size_t>(n)] = broken || (by_overlap ? overlap < args.drift_rule.threshold : !accepted);
    const std::vector<double> here = rewards_of(p, q, args.reward_weight);
    std::copy(here.begin(), here.end(), rewards.begin() + n * k);
    if (!out.accepted) return;
    out.accepted[n] = accepted;
    if (args.entropies) out.student_entropy[n] = static_cast<float>(p.entropy);
    if (args.entropies) out.teacher_entropy[n] = static_cast<float>(q.entropy);
    if (args.entropies || args.divergence) out.reverse_kl[n] = kl(p, q);
  });
  std::copy(drift.begin(), drift.end(), out.drift);
  scan(args.responses, args.scan_rule, args.mask, drift, out.scan);
  for (int64_t slot = 0; slot < positions * k; ++slot) {
    const int64_t n = slot / k;
    const double weight = !args.weight ? out.scan.weight[n] : valid(args.mask, n) ? value(args.weight, n) : 0;
    out.rewards[slot] = weight == 0 ? 0 : static_cast<float>(weight * rewards[static_cast<size_t>(slot)]);
  }
}

inline void compute(const RowStatsArgs& args) {
  const RowStatsArgs::Outputs& out = args.out;
  for (int64_t n = 0; n < args.positions; ++n) {
    const bool here = valid(args.mask, n);
    const Row p = here ? row(args.logits, n, args.k) : Row();
    for (int64_t j = 0; j < args.m; ++j) {
      const int64_t token = id(args.token_ids, n, j);
      out.logprobs[n * args.m + j] = here && token >= 0 ? logprob_of(p, token) : 0;
    }
    for (int64_t j = 0; j < args.k; ++j) out.topk_ids[n * args.k + j] = here ? p.topk[static_cast<size_t>(j)] : j;
    out.entropy[n] = here && args.entropy ? static_cast<float>(p.entropy) : 0;
    out.lse[n] = here ? static_cast<float>(p.lse) : 0;
    out.filled[n] = static_cast<int32_t>(p.filled().size());
  }
}

inline void compute(const TokenStatsArgs& args) {
  const TokenStatsArgs::Outputs& out = args.out;
  for (int64_t n = 0; n < args.positions; ++n) {
    const bool here = valid(args.mask, n);
    const Row rows[2] = {here ? row(args.student, n, args.k) : Row(), here ? row(args.teacher, n, args.k) : Row()};
    const auto stored = [&](double x) { return here ? static_cast<float>(x) : 0; };
    const int64_t token = here && args.token_ids ? id(args.token_ids, n) : -1;
    for (const int side : {0, 1}) {
      for (int64_t j = 0; j < args.k; ++j) {
        const int64_t slot = n * args.k + j, id = here ? rows[side].topk[static_cast<size_t>(j)] : j;
        out.topk_ids[side][slot] = id;
        out.topk_logprobs[side][slot] = stored(logprob_of(rows[side], id));
        out.partner_logprobs[side][slot] = stored(logprob_of(rows[1 - side], id));
      }
      out.lse[side][n] = stored(rows[side].lse);
      out.entropy[side][n] = stored(rows[side].entropy);
      out.divergence[side][n] = stored(kl(rows[side], rows[1 - side]));
      out.token_logprob[side][n] = stored(logprob_of(rows[side], token));
    }
    out.overlap[n] = stored(rows[0].broken || rows[1].broken ? 0 : overlap_of(rows[0].filled(), rows[1].filled()));
  }
}

inline double weight_of(const ReverseKlArgs& args, int64_t n) {
  return !valid(args.mask, n) ? 0 : args.weight ? value(args.weight, n) : 1;
}

inline void compute(const ReverseKlArgs& args) {
  for (int64_t n = 0; n < args.positions; ++n) {
    const double weight = weight_of(args, n);
    args.out.loss[n] =
        weight == 0 ? 0 : static_cast<float>(weight * kl(row(args.student, n, 1), row(args.teacher, n, 1)));
  }
}

// ---- Backward passes.

/// Gradients by the logits, and for each row the size of the terms whose difference its gradient is.
struct Gradients {
  std::vector<std::vector<double>> rows;
  std::vector<double> terms;

  /// Adds a row: NaN if it is spoilt, else times `scale`.
  void add(std::vector<double> gradient, double scale, double size, bool spoilt, int64_t width) {
    for (double& x : gradient) x = spoilt || !std::isfinite(scale) ? kNaN : scale * x;
    gradient.resize(static_cast<size_t>(width));
    rows.push_back(std::move(gradient));
    terms.push_back(std::fmax(0, std::abs(scale) * size));
  }
};

/// The derivative by every logit of sum(coefficients * log p[ids]) + entropy_coefficient * entropy.
inline Gradients backward(const LogprobsBackwardArgs& args) {
  Gradients out;
  const Logits& logits = args.logits;
  for (int64_t n = 0; n < args.positions; ++n) {
    const double of_entropy = args.entropy_coefficient ? value(args.entropy_coefficient, n) : 0;
    std::vector<double> gradient;
    double total = 0, size = std::abs(of_entropy);
    for (int64_t j = 0; j < args.m; ++j) {
      total += value(args.coefficients, n, j);
      size += std::abs(value(args.coefficients, n, j));
    }
    if (size == 0) {
      out.add({}, 0, 0, false, args.width);
      continue;
    }
    const Row p = row(logits, n, 1);
    for (const double logprob : p.logprobs) {
      const double mass = std::exp(logprob);
      gradient.push_back(mass == 0 ? 0 : -mass * (total + of_entropy * (logprob + p.entropy)));
    }
    for (int64_t j = 0; j < args.m; ++j)
      if (id(args.token_ids, n, j) >= 0 && id(args.token_ids, n, j) < logits.vocab_size)
        gradient[static_cast<size_t>(id(args.token_ids, n, j))] += value(args.coefficients, n, j);
    const bool spoilt = p.broken || !std::isfinite(total) || !std::isfinite(of_entropy);
    out.add(gradient, 1 / logits.temperature, size * std::max(1.0, p.entropy), spoilt, args.width);
  }
  return out;
}

/// The derivative of scale * KL(p‖q) by p's logits: p times the excess of log p/q over its mean. For an id with most of
/// the mass this is a sum of small differences, not a difference of large sums. It is 0 if `weight` is 0, and NaN if
/// weight * KL is not a finite float32.
inline Gradients backward(const ReverseKlBackwardArgs& args, const std::function<double(int64_t)>& weight) {
  Gradients out;
  const double t = args.student.temperature, u = args.teacher.temperature;
  for (int64_t n = 0; n < args.positions; ++n) {
    if (weight(n) == 0 || value(args.scale, n) == 0) {
      out.add({}, 0, 0, false, args.width);
      continue;
    }
    const Row p = row(args.student, n, 1), q = row(args.teacher, n, 1);
    const size_t peak = static_cast<size_t>(p.topk[0]);
    const auto excess = [&](size_t v) {  // log p/q at v less that at the peak
      return (p.logits[v] - p.logits[peak]) / t - (q.logits[v] - q.logits[peak]) / u;
    };
    double mean = 0;
    for (size_t v = 0; v < p.logits.size(); ++v)
      if (std::exp(p.logprobs[v]) > 0) mean += std::exp(p.logprobs[v]) * excess(v);
    std::vector<double> gradient;
    for (size_t v = 0; v < p.logits.size(); ++v) {
      const double mass = std::exp(p.logprobs[v]);
      gradient.push_back(mass == 0 ? 0 : mass * (excess(v) - mean) / t);
    }
    const double divergence = kl(p, q);
    out.add(gradient, value(args.scale, n), std::max(divergence, 1.0) / t,
            !std::isfinite(static_cast<float>(weight(n) * divergence)), args.width);
  }
  return out;
}

}  // namespace naive
