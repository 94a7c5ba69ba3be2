// The operators from their definitions, in float64 and one position after another: the oracle of the C++ tests, for the
// CPU and for CUDA. Nothing here knows what a forward pass saves for its backward pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
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

inline int64_t common(const std::vector<int64_t>& student, const std::vector<int64_t>& teacher) {
  return std::count_if(student.begin(), student.end(), [&](int64_t id) {
    return id >= 0 && std::find(teacher.begin(), teacher.end(), id) != teacher.end();
  });
}

/// Whether the token is in the shortest prefix of the candidates whose mass is at least top_p - 1e-6.
inline bool in_nucleus(const std::vector<int64_t>& ids, const std::vector<double>& logprobs, int64_t token,
                       double top_p) {
  double mass = 0;
  bool closed = false, found = false;
  for (size_t j = 0; j < ids.size(); ++j) {
    if (ids[j] < 0) continue;
    if (std::isnan(logprobs[j])) return false;
    if (closed) continue;
    found |= ids[j] == token;
    mass += std::exp(logprobs[j]);
    closed = mass >= top_p - 1e-6;
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

/// Where response b begins, if cu_seqlens are good.
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

/// Overlap and drift of a position, from both models' candidates.
inline bool drifts(const DriftRule& rule, const std::vector<int64_t>& student, const std::vector<int64_t>& teacher,
                   const std::vector<double>& teacher_logprobs, bool broken, const View& token_ids, int64_t n,
                   float* overlap) {
  const double share = broken ? 0 : static_cast<double>(common(student, teacher)) / static_cast<double>(student.size());
  overlap[n] = static_cast<float>(share);
  if (rule.metric == Metric::kOverlap) return broken || share < rule.threshold;
  return broken || !in_nucleus(teacher, teacher_logprobs, id(token_ids, n), rule.top_p);
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
    std::vector<int64_t> student, teacher;
    std::vector<double> logprobs;
    for (int64_t j = 0; j < args.k; ++j) {
      student.push_back(id(args.student_topk_ids, n, j));
      teacher.push_back(id(args.teacher_topk_ids, n, j));
      if (args.teacher_topk_logprobs) logprobs.push_back(value(args.teacher_topk_logprobs, n, j));
    }
    drift[static_cast<size_t>(n)] =
        drifts(args.drift_rule, student, teacher, logprobs, false, args.token_ids, n, args.out.overlap);
  });
  std::copy(drift.begin(), drift.end(), args.out.drift);
  scan(args.responses, args.scan_rule, args.mask, drift, args.out.scan);
}

/// r of a position for the student's candidates.
inline std::vector<double> rewards_of(const Row& p, const Row& q, RewardWeight by) {
  const Row& weigher = by == RewardWeight::kTeacher ? q : p;
  double most = -kInf, mass = 0;  // the weights are a softmax over the k, in which less underflows
  for (const int64_t id : p.topk) most = std::max(most, logprob_of(weigher, id));
  for (const int64_t id : p.topk) mass += std::exp(logprob_of(weigher, id) - most);
  std::vector<double> rewards;
  for (const int64_t id : p.topk) {
    const double a = logprob_of(p, id), b = logprob_of(q, id);
    const bool none = by == RewardWeight::kNone;
    const double weight =
        none ? 1.0 / static_cast<double>(p.topk.size()) : std::exp(logprob_of(weigher, id) - most) / mass;
    rewards.push_back(p.broken || q.broken     ? kNaN
                      : !none && most == -kInf ? 0
                      : a == b || a == -kInf   ? 0
                      : b == -kInf             ? -kInf
                                               : weight * (b - a));
  }
  return rewards;
}

inline void compute(const ReliabilityArgs& args) {
  const int64_t positions = args.responses.positions, k = args.k;
  std::vector<bool> drift(static_cast<size_t>(positions));
  std::vector<double> rewards(static_cast<size_t>(positions * k));
  std::fill_n(args.out.overlap, positions, 0.0f);
  for (int64_t slot = 0; slot < positions * k; ++slot) args.out.topk_ids[slot] = slot % k;
  for_each_valid(args.mask, positions, [&](int64_t n) {
    const Row p = row(args.student, n, k), q = row(args.teacher, n, k);
    std::copy(p.topk.begin(), p.topk.end(), args.out.topk_ids + n * k);
    std::vector<double> logprobs;
    for (const int64_t id : q.topk) logprobs.push_back(logprob_of(q, id));
    drift[static_cast<size_t>(n)] =
        drifts(args.drift_rule, p.topk, q.topk, logprobs, p.broken || q.broken, args.token_ids, n, args.out.overlap);
    const std::vector<double> here = rewards_of(p, q, args.reward_weight);
    std::copy(here.begin(), here.end(), rewards.begin() + n * k);
  });
  std::copy(drift.begin(), drift.end(), args.out.drift);
  scan(args.responses, args.scan_rule, args.mask, drift, args.out.scan);
  for (int64_t slot = 0; slot < positions * k; ++slot) {
    const double weight = args.out.scan.weight[slot / k];
    args.out.rewards[slot] = weight == 0 ? 0 : static_cast<float>(weight * rewards[static_cast<size_t>(slot)]);
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
    const double shared = static_cast<double>(common(rows[0].topk, rows[1].topk));
    out.overlap[n] = stored(rows[0].broken || rows[1].broken ? 0 : shared / static_cast<double>(args.k));
  }
}

// ---- Losses. Of a state only this is written: whether the loss is finite.

inline void write_coefficients(float* out, const std::vector<double>& coefficients, double loss) {
  for (size_t j = 0; j < coefficients.size(); ++j)
    out[j] = std::isfinite(static_cast<float>(loss)) ? static_cast<float>(coefficients[j]) : static_cast<float>(kNaN);
}

/// One candidate: its loss, and the derivative by its log-probability.
inline std::pair<double, double> policy(double logprob, double old, double advantage, const PolicyClips& clips) {
  if (advantage == 0 || logprob == -kInf) return {0, 0};
  if (std::isnan(logprob - old) || std::isnan(advantage)) return {kNaN, kNaN};
  const double ratio = std::exp(std::clamp(logprob - old, -20.0, 20.0)), low = 1 - clips.low, high = 1 + clips.high;
  const bool moves = std::abs(logprob - old) <= 20;
  // The ratios that it moves with, and the one that it counts.
  const double least = advantage > 0 ? 0 : low, most = advantage > 0 ? high : clips.dual;
  const double counted = advantage > 0 ? std::min(ratio, high) : std::min(std::max(ratio, low), clips.dual);
  return {-advantage * counted, moves && ratio >= least && ratio <= most ? -advantage * ratio : 0};
}

inline void compute(const TopkPolicyLossArgs& args) {
  for (int64_t n = 0; n < args.positions; ++n) {
    std::vector<double> coefficients(static_cast<size_t>(args.m));
    double loss = 0;
    bool used = false;
    for (int64_t j = 0; j < args.m; ++j) used |= id(args.topk_ids, n, j) >= 0 && value(args.advantages, n, j) != 0;
    if (used && valid(args.mask, n)) {
      const Row p = row(args.student, n, 1);
      for (int64_t j = 0; j < args.m; ++j) {
        if (id(args.topk_ids, n, j) < 0) continue;
        const double logprob = logprob_of(p, id(args.topk_ids, n, j));
        const double old = args.old_logprobs ? value(args.old_logprobs, n, j) : logprob;
        const auto [term, derivative] = policy(logprob, old, value(args.advantages, n, j), args.clips);
        loss += term;
        coefficients[static_cast<size_t>(j)] = derivative;
      }
    }
    args.out.loss[n] = static_cast<float>(loss);
    write_coefficients(args.out.coefficients + n * args.m, coefficients, loss);
  }
}

inline void compute(const TopkForwardKlArgs& args) {
  for (int64_t n = 0; n < args.positions; ++n) {
    std::vector<double> coefficients(static_cast<size_t>(args.k));
    int64_t* const topk = args.out.student_topk_ids + n * args.k;
    double loss = 0, student_mass = 0, teacher_mass = 0, advantage = 0, shared = 0, overlap = 0;
    std::iota(topk, topk + args.k, 0);
    if (valid(args.mask, n)) {
      const Row p = row(args.student, n, args.k);
      std::copy(p.topk.begin(), p.topk.end(), topk);
      std::vector<int64_t> ids;
      for (int64_t j = 0; j < args.k; ++j) {
        ids.push_back(id(args.teacher_topk_ids, n, j));
        if (ids.back() < 0) continue;
        const double log_p = logprob_of(p, ids.back()), log_q = value(args.teacher_topk_logprobs, n, j);
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
    }
    args.out.loss[n] = static_cast<float>(loss);
    args.out.student_mass[n] = static_cast<float>(student_mass);
    args.out.teacher_mass[n] = static_cast<float>(teacher_mass);
    args.out.overlap[n] = static_cast<float>(overlap);
    args.out.overlap_token_advantage[n] = static_cast<float>(advantage);
    write_coefficients(args.out.coefficients + n * args.k, coefficients, loss);
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

/// Gradients by the logits, and of each row how large the numbers are that its gradient is a difference of.
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

/// The derivative by every logit of scale * sum(coefficients * log p[ids]).
inline Gradients backward(const Logits& student, const View& ids, const View& coefficients, const View& scale,
                          int64_t positions, int64_t m, int64_t width) {
  Gradients out;
  for (int64_t n = 0; n < positions; ++n) {
    std::vector<double> gradient;
    double total = 0, size = 0;
    for (int64_t j = 0; j < m; ++j) {
      total += value(coefficients, n, j);
      size += std::abs(value(coefficients, n, j));
    }
    if (size == 0 || value(scale, n) == 0) {
      out.add({}, 0, 0, false, width);
      continue;
    }
    for (const double logprob : row(student, n, 1).logprobs)
      gradient.push_back(-total * std::exp(logprob) / student.temperature);
    for (int64_t j = 0; j < m; ++j)
      if (id(ids, n, j) >= 0 && id(ids, n, j) < student.vocab_size)
        gradient[static_cast<size_t>(id(ids, n, j))] += value(coefficients, n, j) / student.temperature;
    out.add(gradient, value(scale, n), size / student.temperature, std::isnan(total), width);
  }
  return out;
}

/// The derivative of scale * KL(p‖q) by p's logits: p times what log p/q exceeds its mean by. Of an id that has most of
/// the mass that is a sum of small differences, not the difference of large sums.
inline Gradients backward(const ReverseKlArgs& args, const View& scale, int64_t width) {
  Gradients out;
  const double t = args.student.temperature, u = args.teacher.temperature;
  for (int64_t n = 0; n < args.positions; ++n) {
    const double weight = weight_of(args, n);
    if (weight == 0 || value(scale, n) == 0) {
      out.add({}, 0, 0, false, width);
      continue;
    }
    const Row p = row(args.student, n, 1), q = row(args.teacher, n, 1);
    const size_t peak = static_cast<size_t>(p.topk[0]);
    const auto excess = [&](size_t v) {  // log p/q at v less that at the peak
      return (p.logits[v] - p.logits[peak]) / t - (q.logits[v] - q.logits[peak]) / u;
    };
    double mean = 0;
    for (size_t v = 0; v < p.logits.size(); ++v)
      if (p.logprobs[v] > -kInf) mean += std::exp(p.logprobs[v]) * excess(v);
    std::vector<double> gradient;
    for (size_t v = 0; v < p.logits.size(); ++v) {
      const double mass = std::exp(p.logprobs[v]);
      gradient.push_back(mass == 0 ? 0 : mass * (excess(v) - mean) / t);
    }
    const double divergence = kl(p, q);
    out.add(gradient, value(scale, n), std::max(divergence, 1.0) / t,
            !std::isfinite(static_cast<float>(weight * divergence)), width);
  }
  return out;
}

}  // namespace naive
