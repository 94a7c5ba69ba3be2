// The operators written as plainly as possible, in float64 and one position after another: what the core is held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/responses.h"

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

inline Row row(const View& view, int64_t n, int64_t vocab_size, int64_t k, double temperature) {
  Row row;
  bool finite = false;
  for (int64_t v = 0; v < vocab_size; ++v) {
    row.logits.push_back(value(view, n, v));
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

/// C, R, L and E from each position's validity and drift.
inline void scan(const Responses& responses, const ScanRule& rule, const std::vector<bool>& is_valid,
                 const std::vector<bool>& drift, const ScanOutputs& out) {
  for (int64_t b = 0; b < responses.count; ++b) {
    const Extent extent = extent_of(responses, b);
    int64_t drifted = rule.drift_count ? load_int32(rule.drift_count, b) : 0;
    out.effective_length[b] = 0;
    for (int64_t n = extent.begin; n < extent.end; ++n) {
      const bool here = is_valid[static_cast<size_t>(n)];
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

inline void reliability(const ReliabilityArgs& args) {
  const LogitsPair& logits = args.logits;
  const size_t positions = static_cast<size_t>(args.responses.positions), k = static_cast<size_t>(args.k);
  std::vector<bool> is_valid(positions), drift(positions);
  std::vector<double> rewards(positions * k);
  for (size_t n = 0; n < positions; ++n) {
    const int64_t at = static_cast<int64_t>(n);
    is_valid[n] = valid(args.mask, at);
    args.overlap[n] = 0;
    args.drift[n] = false;
    std::iota(args.topk_ids + n * k, args.topk_ids + (n + 1) * k, 0);
    if (!is_valid[n]) continue;
    const Row p = row(logits.student, at, logits.vocab_size, args.k, logits.student_temperature);
    const Row q = row(logits.teacher, at, logits.vocab_size, args.k, logits.teacher_temperature);
    const bool broken = p.broken || q.broken;
    std::copy(p.topk.begin(), p.topk.end(), args.topk_ids + n * k);
    const double overlap = broken ? 0 : static_cast<double>(common(p.topk, q.topk)) / static_cast<double>(k);
    args.overlap[n] = static_cast<float>(overlap);
    if (args.drift_rule.metric == Metric::kOverlap) {
      drift[n] = overlap < args.drift_rule.threshold;
    } else {
      std::vector<double> logprobs;
      for (const int64_t id : q.topk) logprobs.push_back(q.logprobs[static_cast<size_t>(id)]);
      drift[n] = broken || !in_nucleus(q.topk, logprobs, id(args.token_ids, at), args.drift_rule.top_p);
    }
    args.drift[n] = drift[n];

    const Row& weigher = args.reward_weight == RewardWeight::kTeacher ? q : p;
    // The weights are a softmax over the k: mass that underflows in the whole row does not here.
    double most = -kInf, mass = 0;
    for (const int64_t id : p.topk) most = std::max(most, weigher.logprobs[static_cast<size_t>(id)]);
    for (const int64_t id : p.topk) mass += std::exp(weigher.logprobs[static_cast<size_t>(id)] - most);
    for (size_t j = 0; j < k; ++j) {
      const size_t id = static_cast<size_t>(p.topk[j]);
      const double a = p.logprobs[id], b = q.logprobs[id];
      const double weight = args.reward_weight == RewardWeight::kNone ? 1.0 / static_cast<double>(k)
                                                                      : std::exp(weigher.logprobs[id] - most) / mass;
      rewards[n * k + j] = broken                                                       ? kNaN
                           : args.reward_weight != RewardWeight::kNone && most == -kInf ? 0
                           : a == b || a == -kInf                                       ? 0
                           : b == -kInf                                                 ? -kInf
                                                                                        : weight * (b - a);
    }
  }
  scan(args.responses, args.scan_rule, is_valid, drift, args.scan);
  for (size_t n = 0; n < positions; ++n)
    for (size_t j = 0; j < k; ++j) {
      const double weight = args.scan.weight[n];
      args.rewards[n * k + j] = weight == 0 ? 0 : static_cast<float>(weight * rewards[n * k + j]);
    }
}

inline void reliability_from_topk(const ReliabilityFromTopkArgs& args) {
  const size_t positions = static_cast<size_t>(args.responses.positions);
  std::vector<bool> is_valid(positions), drift(positions);
  for (size_t n = 0; n < positions; ++n) {
    const int64_t at = static_cast<int64_t>(n);
    is_valid[n] = valid(args.mask, at);
    args.overlap[n] = 0;
    args.drift[n] = false;
    if (!is_valid[n]) continue;
    std::vector<int64_t> student, teacher;
    std::vector<double> logprobs;
    for (int64_t j = 0; j < args.k; ++j) {
      student.push_back(id(args.student_topk_ids, at, j));
      teacher.push_back(id(args.teacher_topk_ids, at, j));
      if (args.teacher_topk_logprobs) logprobs.push_back(value(args.teacher_topk_logprobs, at, j));
    }
    const double overlap = static_cast<double>(common(student, teacher)) / static_cast<double>(args.k);
    args.overlap[n] = static_cast<float>(overlap);
    drift[n] = args.drift_rule.metric == Metric::kOverlap
                   ? overlap < args.drift_rule.threshold
                   : !in_nucleus(teacher, logprobs, id(args.token_ids, at), args.drift_rule.top_p);
    args.drift[n] = drift[n];
  }
  scan(args.responses, args.scan_rule, is_valid, drift, args.scan);
}

inline void reliability_from_drift(const ReliabilityFromDriftArgs& args) {
  const size_t positions = static_cast<size_t>(args.responses.positions);
  std::vector<bool> is_valid(positions), drift(positions);
  for (size_t n = 0; n < positions; ++n) {
    is_valid[n] = valid(args.mask, static_cast<int64_t>(n));
    drift[n] = value(args.drift, static_cast<int64_t>(n)) != 0;
  }
  scan(args.responses, args.scan_rule, is_valid, drift, args.scan);
}

inline void token_stats(const TokenStatsArgs& args) {
  const LogitsPair& logits = args.logits;
  for (int64_t n = 0; n < args.positions; ++n) {
    const bool here = valid(args.mask, n);
    Row p, q;
    if (here) {
      p = row(logits.student, n, logits.vocab_size, args.k, logits.student_temperature);
      q = row(logits.teacher, n, logits.vocab_size, args.k, logits.teacher_temperature);
    }
    const auto store = [&](float* out, double x) { out[n] = here ? static_cast<float>(x) : 0; };
    for (int64_t j = 0; j < args.k; ++j) {
      const int64_t at = n * args.k + j;
      const size_t column = static_cast<size_t>(j);
      const int64_t s = here ? p.topk[column] : j, t = here ? q.topk[column] : j;
      const auto logprob = [&](const Row& row, int64_t id) {
        return here ? static_cast<float>(row.logprobs[static_cast<size_t>(id)]) : 0;
      };
      args.student_topk_ids[at] = s;
      args.teacher_topk_ids[at] = t;
      args.student_topk_logprobs[at] = logprob(p, s);
      args.teacher_topk_logprobs[at] = logprob(q, t);
      args.teacher_on_student_logprobs[at] = logprob(q, s);
      args.student_on_teacher_logprobs[at] = logprob(p, t);
    }
    store(args.overlap,
          p.broken || q.broken ? 0 : static_cast<double>(common(p.topk, q.topk)) / static_cast<double>(args.k));
    store(args.student_lse, p.lse);
    store(args.teacher_lse, q.lse);
    store(args.student_entropy, p.entropy);
    store(args.teacher_entropy, q.entropy);
    store(args.reverse_kl, kl(p, q));
    store(args.forward_kl, kl(q, p));
    const int64_t token = here && args.token_ids ? id(args.token_ids, n) : -1;
    const bool known = token >= 0 && token < logits.vocab_size;
    store(args.student_token_logprob, known ? p.logprobs[static_cast<size_t>(token)] : kNaN);
    store(args.teacher_token_logprob, known ? q.logprobs[static_cast<size_t>(token)] : kNaN);
  }
}

}  // namespace naive
