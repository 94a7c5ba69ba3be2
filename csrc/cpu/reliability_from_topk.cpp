#include "operators/reliability_from_topk.h"

#include <algorithm>
#include <limits>

#include "../math/drift.h"
#include "responses.h"
#include "row_pass.h"

namespace pruneopd {
namespace {

/// Calls visit with a typed pointer to the ids of position n.
template <class Visit>
auto with_ids(const View& ids, int64_t n, const Visit& visit) {
  const void* at = address(ids, ids.at.offset(n));
  return ids.type == Scalar::kI32 ? visit(static_cast<const int32_t*>(at)) : visit(static_cast<const int64_t*>(at));
}

/// The ids of position n whose slots are not empty, in their order; returns how many these are.
int filled_ids(const View& ids, const View& logprobs, int64_t n, int64_t k, int64_t* out) {
  return with_ids(ids, n, [&](auto at) {
    int filled = 0;
    for (int64_t j = 0; j < k; ++j) {
      out[filled] = at[j * ids.step];
      filled += out[filled] >= 0 && !(logprobs && real_at(logprobs, n, j) == -std::numeric_limits<double>::infinity());
    }
    return filled;
  });
}

/// The same ids as int32. False: one of them is below 0 or does not fit.
template <class T>
bool narrow_ids(const T* ids, int64_t step, int64_t count, int32_t* out) {
  uint64_t all = 0;
  for (int64_t j = 0; j < count; ++j) {
    const T id = step == 1 ? ids[j] : ids[j * step];
    all |= static_cast<uint64_t>(static_cast<int64_t>(id));
    out[j] = static_cast<int32_t>(id);
  }
  return all <= INT32_MAX;
}

/// O from `pairs(ids, size, among, count)`, how many pairs of equal ids there are. NaN where an id is twice, which no
/// caller sees: the input is refused.
template <class Ids, class Pairs>
double overlap_if_distinct(const Ids& student, int student_size, const Ids& teacher, int teacher_size,
                           const Pairs& pairs) {
  if (pairs(student, student_size, student, student_size) != student_size ||
      pairs(teacher, teacher_size, teacher, teacher_size) != teacher_size)
    return std::numeric_limits<double>::quiet_NaN();
  return overlap_of(pairs(student, student_size, teacher, teacher_size), student_size, teacher_size);
}

double overlap_at(const ReliabilityFromTopkArgs& args, int64_t n) {
  const auto narrow_pairs = [](const IdBlocks& ids, int, const IdBlocks& among, int count) {
    return row_kernels().count_equal(ids, among.ids, count);
  };
  const int k = static_cast<int>(args.k);
  if (!args.student_topk_logprobs && !args.teacher_topk_logprobs) {
    IdBlocks student(k), teacher(k);
    const auto narrow_full = [&](const View& ids, int32_t* out) {
      return with_ids(ids, n, [&](auto at) { return narrow_ids(at, ids.step, k, out); });
    };
    if (narrow_full(args.student_topk_ids, student.ids) && narrow_full(args.teacher_topk_ids, teacher.ids))
      return overlap_if_distinct(student, k, teacher, k, narrow_pairs);
  }
  int64_t student[256], teacher[256];
  const int student_size = filled_ids(args.student_topk_ids, args.student_topk_logprobs, n, k, student);
  const int teacher_size = filled_ids(args.teacher_topk_ids, args.teacher_topk_logprobs, n, k, teacher);
  IdBlocks narrow_student(student_size), narrow_teacher(teacher_size);
  if (narrow_ids(student, 1, student_size, narrow_student.ids) &&
      narrow_ids(teacher, 1, teacher_size, narrow_teacher.ids))
    return overlap_if_distinct(narrow_student, student_size, narrow_teacher, teacher_size, narrow_pairs);
  const auto pairs = [](const int64_t* ids, int size, const int64_t* among, int count) {
    int equal = 0;
    for (int j = 0; j < size; ++j) equal += static_cast<int>(std::count(among, among + count, ids[j]));
    return equal;
  };
  return overlap_if_distinct<int64_t*>(student, student_size, teacher, teacher_size, pairs);
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
