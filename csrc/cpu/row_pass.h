// The row pass: everything that is read from the logits of one position. With divergences it goes over both rows in
// step, else over one after the other.
// docs/design.md tells why it is built like this.
//
// row_pass.cpp is compiled once for each instruction set; row_kernels() is the set in use.
#pragma once

#include <cstdint>
#include <memory>

#include "../math/order.h"
#include "../math/state.h"
#include "scalars.h"
#include "views.h"

namespace pruneopd {

/// Elements of a row whose sums are formed in float32 and whose maximum is kept for the selection.
constexpr int64_t kTile = 512;

struct Row {
  const void* logits;  // contiguous
  Scalar type;
  double temperature;
};

/// Calls visit with typed pointers to the logits of both rows.
template <class Visit>
auto with_logits(const Row& student, const Row& teacher, Visit&& visit) {
  return with_logits(student.logits, student.type, [&](auto x) {
    return with_logits(teacher.logits, teacher.type, [&](auto y) { return visit(x, y); });
  });
}

/// Working memory of one thread, and where the candidates of the last pass lie. Plain pointers: row_pass.cpp must not
/// instantiate templates of the standard library (see simd.h).
struct RowScratch {
  float *student_tile_max, *teacher_tile_max;
  uint64_t* tiles;                                     // selection: the tiles to visit
  Candidate *student_candidates, *teacher_candidates;  // after a pass the first k are the top-k, in order
  int64_t capacity;                                    // of each of the two
};

/// Owns a RowScratch: some 20 KB for 16 candidates of a vocabulary of 150 000.
class RowMemory {
 public:
  RowMemory(int64_t vocab_size, int64_t k);
  RowScratch& scratch() { return scratch_; }

 private:
  std::unique_ptr<float[]> tile_max_;
  std::unique_ptr<uint64_t[]> integers_;
  RowScratch scratch_;
};

struct RowPairSummary {
  RowSummary student, teacher;
  double reverse_kl = 0, forward_kl = 0;  // student‖teacher, teacher‖student
  double peak_excess = 0;                 // with reverse_kl, where the student is peaked: see DivergenceState

  bool broken() const { return student.broken || teacher.broken; }
};

/// What a pass over both rows sums: the masses; also the student's mean and reverse_kl; also the teacher's mean and
/// forward_kl.
enum class Sums : uint8_t { kMass, kDivergence, kAll };

/// Up to 256 ids, filled up with -1, which occurs nowhere, to whole blocks.
struct IdBlocks {
  static constexpr int64_t kBlock = 16;
  int32_t ids[256];
  int64_t blocks;

  explicit IdBlocks(int64_t count) : blocks((count + kBlock - 1) / kBlock) {
    for (int64_t j = count; j < blocks * kBlock; ++j) ids[j] = -1;
  }
};

struct RowKernels {
  const char* instruction_set;
  /// The pass over [0, vocab_size) of both rows, and the k best of each, of which there may be none.
  RowPairSummary (*row_pair)(const Row& student, const Row& teacher, int64_t vocab_size, int64_t k, Sums sums,
                             RowScratch& scratch);
  /// The pass over one row alone, and its k best, as the student's; its mean only if it is asked for.
  RowSummary (*row)(const Row& row, int64_t vocab_size, int64_t k, bool mean, RowScratch& scratch);
  /// softmax_gradient of each id, in the row's type.
  void (*softmax_gradient)(const Row& row, int64_t vocab_size, const RowState& state, double total, double entropy,
                           void* out);
  /// factor * divergence_gradient of each id, in the student's type.
  void (*divergence_gradient)(const Row& student, const Row& teacher, int64_t vocab_size, const DivergenceState& state,
                              double factor, void* out);
  /// How many pairs there are of one of `ids` and an equal one of the `count` in `among`.
  int (*count_equal)(const IdBlocks& ids, const int32_t* among, int64_t count);
  /// The maxima of two rows, read in step like row_pair reads them.
  void (*row_max)(const Row& student, const Row& teacher, int64_t vocab_size, float* student_max, float* teacher_max);
};

const RowKernels& row_kernels();

/// The same answers by plain loops in float64, for the rare row with a NaN, an infinity, or values that float32 cannot
/// compute with.
RowPairSummary row_pair_exact(const Row& student, const Row& teacher, int64_t vocab_size, int64_t k, Sums sums,
                              RowScratch& scratch);
RowSummary row_exact(const Row& row, int64_t vocab_size, int64_t k, bool mean, RowScratch& scratch);
void softmax_gradient_exact(const Row& row, int64_t vocab_size, const RowState& state, double total, double entropy,
                            void* out);
void divergence_gradient_exact(const Row& student, const Row& teacher, int64_t vocab_size, const DivergenceState& state,
                               double factor, void* out);

/// The processor's mode on this thread, whatever the caller has set: subnormal arguments stay what they are (as zeros,
/// logits would tie). In the row pass, results too small for a normal float become 0, because they are slow.
class FloatMode {
 public:
  explicit FloatMode(bool flush_results = true);
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace pruneopd
