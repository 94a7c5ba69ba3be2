// What operators compute with: tensors as views of raw memory, on the CPU or a GPU. No torch and no Python here. The
// caller has checked shapes and types. Values in tensors are never trusted as addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace pruneopd {

/// The largest k of every operator.
constexpr int64_t kMaxCandidates = 256;
/// The largest m of row_stats and logprobs_backward: ids that a caller names.
constexpr int64_t kMaxTokenIds = 512;

enum class Scalar : uint8_t { kBool, kU8, kI8, kI16, kI32, kI64, kF16, kBF16, kF32, kF64 };

/// Where position n lies in a tensor of any strides: the leading axes, flattened in row-major order.
class Positions {
 public:
  Positions() = default;
  /// Sizes and strides (in elements) of the leading axes. Axes that can be walked as one are merged.
  Positions(const int64_t* sizes, const int64_t* strides, int64_t axes) {
    for (int64_t axis = 0; axis < axes; ++axis) {
      count_ *= sizes[axis];
      if (sizes[axis] == 1) continue;
      if (!sizes_.empty() && strides_.back() == sizes[axis] * strides[axis]) {
        sizes_.back() *= sizes[axis];
        strides_.back() = strides[axis];
      } else {
        sizes_.push_back(sizes[axis]);
        strides_.push_back(strides[axis]);
      }
    }
  }

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

  /// The axes after merging, from the outermost; none for a single position.
  int64_t axes() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t axis) const { return sizes_[static_cast<size_t>(axis)]; }
  int64_t stride(int64_t axis) const { return strides_[static_cast<size_t>(axis)]; }

 private:
  int64_t count_ = 1;
  std::vector<int64_t> sizes_, strides_;
};

/// A tensor with one value per position, or one row per position whose values are `step` elements apart.
struct View {
  const void* data = nullptr;  // null: not given
  Scalar type = Scalar::kF32;
  Positions at;
  int64_t step = 1;

  explicit operator bool() const { return data != nullptr; }
};

/// One flag per position, side by side.
inline View view_of_flags(const bool* flags, int64_t positions) {
  const int64_t stride = 1;
  return {flags, Scalar::kBool, Positions(&positions, &stride, 1)};
}

/// Which positions form a response: packed ones by cu_seqlens, padded ones as `count` rows of one length.
struct Responses {
  int64_t count = 0;      // B
  int64_t positions = 0;  // B * T, or N
  View cu_seqlens;        // [B + 1] with any values; not given if padded
};

enum class Metric : uint8_t { kOverlap, kTopP };
enum class RewardWeight : uint8_t { kStudent, kTeacher, kNone };

struct DriftRule {
  Metric metric = Metric::kOverlap;
  double threshold = 0, top_p = 0;
};

struct ScanRule {
  double w_drop = 0, w_base = 0, eps = 0;
  View drift_count;  // [B] int32, the count to start from; not given: zeros
};

/// The outputs along a response. Every output of an operator is contiguous.
struct ScanOutputs {
  int32_t* drift_count;
  float* reliability;
  float* weight;
  int32_t* effective_length;  // [B]
};

/// One model's logits. Only ids below vocab_size exist; the rows may be wider.
struct Logits {
  View rows;  // its `step` is 1
  double temperature = 1;
  int64_t vocab_size = 0;
};

/// Runs body(begin, end) over disjoint ranges that cover [0, count), each but the last at least `grain` long.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

/// Computes an operator on the CPU: cpu/<operator>.cpp specialises this for the operator's arguments.
template <class Args>
void compute(const Args& args, const ParallelFor& parallel_for);

namespace cuda {
struct Queue;  // see cuda/launch.h
/// Computes an operator on a GPU: cuda/<operator>.cu specialises this. Throws std::runtime_error if CUDA refuses.
template <class Args>
void compute(const Args& args, const Queue& queue);
}  // namespace cuda

}  // namespace pruneopd
