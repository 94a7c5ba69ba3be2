#include "operators/reliability_from_topk.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "../math/drift.h"
#include "responses.h"
#include "row_pass.h"

namespace pruneopd {
namespace {

/// Copies the ids of position n, with `empty` in empty slots; returns how many are filled, or -1 if an id does not fit.
template <class Id>
int copy_ids(const View& ids, const View& logprobs, int64_t n, int64_t k, Id empty, Id* out) {
  constexpr uint64_t kMost = std::numeric_limits<Id>::max();
  const auto copy = [&](const auto* at) {
    int filled = 0;
    uint64_t all = 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = ids.step == 1 ? at[j] : at[j * ids.step];
      out[j] = static_cast<Id>(id);
      all |= static_cast<uint64_t>(id);
    }
    if (all <= kMost && !logprobs) return static_cast<int>(k);  // mostly: no slot is empty
    all = 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = at[j * ids.step];
      const bool is_empty = id < 0 || (logprobs && real_at(logprobs, n, j) == -std::numeric_limits<double>::infinity());
      out[j] = is_empty ? empty : static_cast<Id>(id);
      filled += !is_empty;
      all |= is_empty ? 0 : static_cast<uint64_t>(id);
    }
    return all <= kMost ? filled : -1;
  };
  const void* at = address(ids, ids.at.offset(n));
  return ids.type == Scalar::kI32 ? copy(static_cast<const int32_t*>(at)) : copy(static_cast<const int64_t*>(at));
}

/// O from `count_equal(ids, among)`, how many pairs of equal ids there are; no value if an id does not fit. NaN where
/// an id is twice, which no caller sees: the input is refused.
template <class Slots, class CountEqual>
std::optional<double> overlap_at(const ReliabilityFromTopkArgs& args, int64_t n, Slots& student, Slots& teacher,
                                 const CountEqual& count_equal) {
  const int k = static_cast<int>(args.k);
  // Two numbers that are no id and equal none of the other side.
  const int student_size = copy_ids(args.student_topk_ids, args.student_topk_logprobs, n, k, {-2}, student.ids);
  const int teacher_size = copy_ids(args.teacher_topk_ids, args.teacher_topk_logprobs, n, k, {-3}, teacher.ids);
  if (student_size < 0 || teacher_size < 0) return std::nullopt;
  const auto is_distinct = [&](const Slots& one, int size) {
    return count_equal(one, one) == size + (k - size) * (k - size);
  };
  if (!is_distinct(student, student_size) || !is_distinct(teacher, teacher_size))
    return std::numeric_limits<double>::quiet_NaN();
  return overlap_of(count_equal(student, teacher), student_size, teacher_size);
}

double overlap_at(const ReliabilityFromTopkArgs& args, int64_t n) {
  const int64_t k = args.k;
  IdBlocks student(k), teacher(k);
  const auto narrow = overlap_at(args, n, student, teacher, [&](const IdBlocks& ids, const IdBlocks& among) {
    return row_kernels().count_equal(ids, among.ids, k);
  });
  if (narrow) return *narrow;
  struct WideIds {
    int64_t ids[256];
  } wide_student, wide_teacher;
  return *overlap_at(args, n, wide_student, wide_teacher, [&](const WideIds& wide, const WideIds& among) {
    int64_t equal = 0;
    for (int64_t j = 0; j < k; ++j) equal += std::count(among.ids, among.ids + k, wide.ids[j]);
    return static_cast<int>(equal);
  });
}

bool rejected(const ReliabilityFromTopkArgs& args, int64_t n) {
  const int64_t token = id_at(args.token_ids, n);
  Nucleus nucleus(args.drift_rule.top_p);
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t id = id_at(args.teacher_topk_ids, n, j);
    const double logprob = real_at(args.teacher_topk_logprobs, n, j);
    if (id >= 0 && logprob != -std::numeric_limits<double>::infinity()) nucleus.add(logprob, id == token);
  }
  return !nucleus.accepts();
}

void pass_position(const ReliabilityFromTopkArgs& args, int64_t n) {
  const bool valid = load_flag(args.mask, n), by_overlap = args.drift_rule.metric == Metric::kOverlap;
  const double overlap = valid ? overlap_at(args, n) : 0;
  args.out.overlap[n] = static_cast<float>(overlap);
  args.out.drift[n] = valid && (by_overlap ? overlap < args.drift_rule.threshold : rejected(args, n));
}

}  // namespace

template <>
void compute(const ReliabilityFromTopkArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.responses.positions, 1024, [&](int64_t begin, int64_t end) {
    const FloatMode mode(/*flush_results=*/false);
    for (int64_t n = begin; n < end; ++n) pass_position(args, n);
  });
  scan_responses(args.responses, args.mask, view_of_flags(args.out.drift, args.responses.positions), args.scan_rule,
                 args.out.scan, parallel_for, [](int64_t, int64_t) {});
}

}  // namespace pruneopd
