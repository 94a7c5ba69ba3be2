// What every implementation in C++ computes with: the operators' arguments over raw memory, the CPU's (csrc/cpu) or a
// GPU's (csrc/cuda). No torch and no Python here. Arguments have been checked by the caller; values inside tensors are
// still never trusted as addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pruneopd {

/// The greatest k of every operator.
constexpr int64_t kMaxCandidates = 256;
/// The greatest m of topk_policy_loss.
constexpr int64_t kMaxPolicyCandidates = 512;
/// What the losses save of a row's softmax: see RowState and DivergenceState in math/loss.h.
constexpr int64_t kRowState = 2, kDivergenceState = 5;

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

  /// What is left after merging: none for a single position. Axis 0 is the outermost.
  int64_t axes() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t axis) const { return sizes_[static_cast<size_t>(axis)]; }
  int64_t stride(int64_t axis) const { return strides_[static_cast<size_t>(axis)]; }

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
  int64_t count = 0;      // B
  int64_t positions = 0;  // B * T, or N
  View cu_seqlens;        // [B + 1] int32, whose values may be anything; not given when padded
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
  View drift_count;  // [B] int32, the count carried in; not given: zeros
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

// ---- Losses: what the forward pass leaves for the backward pass, and the gradients from that.

/// One side's logits.
struct Logits {
  View rows;  // its `step` is 1
  double temperature = 1;
  int64_t vocab_size = 0;
};

struct TopkPolicyLossArgs {
  Logits student;
  View topk_ids, advantages, old_logprobs;  // [..., m]
  View mask;
  int64_t positions, m;
  double clip_low, clip_high, clip_dual;

  float* loss;
  float* coefficients;  // [..., m]: derivatives of the loss by the candidates' log-probabilities
  float* state;         // [..., kRowState]
};

struct TopkForwardKlArgs {
  Logits student;
  View teacher_topk_ids, teacher_topk_logprobs;  // [..., k]
  View mask;
  int64_t positions, k;
  double logprob_min;  // -inf: none

  float *loss, *student_mass, *teacher_mass, *overlap, *overlap_token_advantage;
  int64_t* student_topk_ids;  // [..., k]
  float* coefficients;        // [..., k]
  float* state;               // [..., kRowState]
};

struct ReverseKlArgs {
  LogitsPair logits;
  View mask, weight;
  int64_t positions;

  float* loss;
  float* state;  // [..., kDivergenceState]
};

/// The gradient of scale * sum(coefficients * log p[topk_ids]) by the logits. Ids that do not exist here have a part in
/// the sum of coefficients and no logit.
struct LogprobsBackwardArgs {
  Logits student;
  View topk_ids, coefficients;  // [..., m]
  View state;                   // [..., kRowState]
  View scale;
  int64_t positions, m;

  void* gradient;  // [..., width], of the logits' type
  int64_t width;
};

/// The gradient of scale * KL(student‖teacher) by the student's logits.
struct ReverseKlBackwardArgs {
  LogitsPair logits;
  View state;  // [..., kDivergenceState]
  View scale;
  int64_t positions;

  void* gradient;  // [..., width], of the student's type
  int64_t width;
};

}  // namespace pruneopd
