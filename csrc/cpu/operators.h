// The CPU operators over raw memory: what the torch library (csrc/torch) and the NumPy module (csrc/host) both call.
// No torch and no Python here. Arguments have been checked by the caller; values inside tensors are still never
// trusted as addresses.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pruneopd {

enum class Scalar : uint8_t { kBool, kU8, kI8, kI16, kI32, kI64, kF16, kBF16, kF32, kF64 };

/// Where position n lies in a tensor of any strides: the leading axes, flattened in row-major order.
class Positions {
 public:
  Positions() = default;
  /// Sizes and strides (in elements) of the leading axes; axes that can be walked as one are merged.
  Positions(const int64_t* sizes, const int64_t* strides, int64_t axes);

  int64_t count() const { return count_; }
  /// Whether position n lies at n.
  bool dense() const { return sizes_.empty() || (sizes_.size() == 1 && strides_[0] == 1); }
  int64_t offset(int64_t n) const {
    int64_t offset = 0;
    for (size_t axis = sizes_.size(); axis-- > 1;) {
      offset += n % sizes_[axis] * strides_[axis];
      n /= sizes_[axis];
    }
    return sizes_.empty() ? 0 : offset + n * strides_[0];
  }

 private:
  int64_t count_ = 1;
  std::vector<int64_t> sizes_, strides_;
};

/// A tensor seen position by position: one value each, or with `step` (the stride of the last axis) a row of them.
struct View {
  const void* data = nullptr;  // null: not given
  Scalar type = Scalar::kF32;
  Positions at;
  int64_t step = 1;

  explicit operator bool() const { return data != nullptr; }
};

/// How the positions make up responses: packed by cu_seqlens, or `count` rows of one length.
struct Responses {
  int64_t count = 0;                    // B
  int64_t positions = 0;                // B * T, or N
  const int32_t* cu_seqlens = nullptr;  // [B + 1]; null when padded

  int64_t begin(int64_t b) const { return cu_seqlens ? clamp(cu_seqlens[b]) : b * (positions / count); }
  int64_t end(int64_t b) const { return cu_seqlens ? clamp(cu_seqlens[b + 1]) : (b + 1) * (positions / count); }

 private:
  int64_t clamp(int64_t n) const { return n < 0 ? 0 : n > positions ? positions : n; }
};

enum class Metric : uint8_t { kOverlap, kTopP };
enum class RewardWeight : uint8_t { kStudent, kTeacher, kNone };

struct DriftRule {
  Metric metric = Metric::kOverlap;
  double threshold = 0.7;
  double top_p = 0.95;
};

struct ScanRule {
  double w_drop = 0.01;
  double w_base = 0.5;
  double eps = 1e-8;
  const int32_t* drift_count = nullptr;  // [B], the count carried in; null: zeros
};

/// The outputs along a response. Every output in this file is contiguous.
struct ScanOutputs {
  int32_t* drift_count;
  float* reliability;
  float* weight;
  int32_t* effective_length;  // [B]
};

struct LogitsPair {
  View student, teacher;  // their `step` is 1
  double student_temperature = 1, teacher_temperature = 1;
  int64_t vocab_size = 0;
};

struct ReliabilityArgs {
  LogitsPair logits;
  View mask, token_ids;  // token_ids is read when metric is kTopP
  Responses responses;
  int64_t k = 16;
  DriftRule drift_rule;
  ScanRule scan_rule;
  RewardWeight reward_weight = RewardWeight::kStudent;

  float* overlap;
  bool* drift;
  ScanOutputs scan;
  int64_t* topk_ids;  // [..., k]
  float* rewards;     // [..., k]
};

struct ReliabilityFromTopkArgs {
  View student_topk_ids, teacher_topk_ids;  // [..., k]
  View mask, teacher_topk_logprobs, token_ids;
  Responses responses;
  int64_t k;
  DriftRule drift_rule;
  ScanRule scan_rule;

  float* overlap;
  bool* drift;
  ScanOutputs scan;
};

struct ReliabilityFromDriftArgs {
  View drift, mask;
  Responses responses;
  ScanRule scan_rule;

  ScanOutputs scan;
};

struct TokenStatsArgs {
  LogitsPair logits;
  View mask, token_ids;
  int64_t positions;
  int64_t k = 16;

  int64_t *student_topk_ids, *teacher_topk_ids;
  float *student_topk_logprobs, *teacher_topk_logprobs;
  float *teacher_on_student_logprobs, *student_on_teacher_logprobs;
  float* overlap;
  float *student_lse, *teacher_lse, *student_entropy, *teacher_entropy;
  float *reverse_kl, *forward_kl;
  float *student_token_logprob, *teacher_token_logprob;
};

/// Runs body(begin, end) over disjoint ranges that cover [0, count), each at least `grain` long but the last.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

void reliability(const ReliabilityArgs& args, const ParallelFor& parallel_for);
void reliability_from_topk(const ReliabilityFromTopkArgs& args, const ParallelFor& parallel_for);
void reliability_from_drift(const ReliabilityFromDriftArgs& args, const ParallelFor& parallel_for);
void token_stats(const TokenStatsArgs& args, const ParallelFor& parallel_for);

/// The row maxima of both tensors, [positions] each: what merely reading the logits costs, for the benchmarks.
void row_max(const LogitsPair& logits, int64_t positions, float* student_max, float* teacher_max,
             const ParallelFor& parallel_for);

/// The instruction sets this build has and this processor runs, best first: "avx512", "avx2", "portable".
std::vector<std::string> instruction_sets();
/// The one in use: the best, until another is chosen. Choosing one that is not listed returns false.
std::string instruction_set();
bool set_instruction_set(const std::string& name);

}  // namespace pruneopd
