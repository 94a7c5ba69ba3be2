#include "operators/reliability_from_topk.h"

#include <algorithm>
#include <limits>

#include "../math/drift.h"
#include "responses.h"
#include "row_pass.h"

namespace pruneopd {
namespace {

/// The ids of position n whose slots are not empty, in their order; returns how many these are.
template <class T>
int filled_ids(const View& ids, const View& logprobs, int64_t n, int64_t k, int64_t* out) {
  const T* at = static_cast<const T*>(ids.data) + ids.at.offset(n);
  int filled = 0;
  for (int64_t j = 0; j < k; ++j) {
    out[filled] = at[j * ids.step];
    filled += out[filled] >= 0 && !(logprobs && real_at(logprobs, n, j) == -std::numeric_limits<double>::infinity());
  }
  return filled;
}

int filled_ids(const View& ids, const View& logprobs, int64_t n, int64_t k, int64_t* out) {
  return ids.type == Scalar::kI32 ? filled_ids<int32_t>(ids, logprobs, n, k, out)
                                  : filled_ids<int64_t>(ids, logprobs, n, k, out);
}

/// The same as int32. False: one of them does not fit.
bool narrow_ids(const int64_t* ids, int count, int32_t* out) {
  int64_t all = 0;
  for (int j = 0; j < count; ++j) {
    all |= ids[j];
    out[j] = static_cast<int32_t>(ids[j]);
  }
  return all <= INT32_MAX;
}

/// The ids of position n as int32. False: a slot is empty, or an id does not fit.
template <class T>
bool narrow_full(const View& ids, int64_t n, int64_t k, int32_t* out) {
  const T* at = static_cast<const T*>(ids.data) + ids.at.offset(n);
  uint64_t all = 0;
  for (int64_t j = 0; j < k; ++j) {
    const T id = ids.step == 1 ? at[j] : at[j * ids.step];
    all |= static_cast<uint64_t>(static_cast<int64_t>(id));
    out[j] = static_cast<int32_t>(id);
  }
  return all <= INT32_MAX;
}

bool narrow_full(const View& ids, const View& logprobs, int64_t n, int64_t k, int32_t* out) {
  if (logprobs) return false;
  return ids.type == Scalar::kI32 ? narrow_full<int32_t>(ids, n, k, out) : narrow_full<int64_t>(ids, n, k, out);
}

/// O from how many pairs of equal ids there are between both sides and within each; NaN where an id is twice, which no
/// caller sees: the input is refused.
double overlap_of_pairs(int between, int in_student, int in_teacher, int student_size, int teacher_size) {
  const bool distinct = in_student == student_size && in_teacher == teacher_size;
  return distinct ? overlap_of(between, student_size, teacher_size) : std::numeric_limits<double>::quiet_NaN();
}

double overlap_of_narrow(const IdBlocks& student, const IdBlocks& teacher, int student_size, int teacher_size) {
  const auto pairs = row_kernels().count_equal;
  return overlap_of_pairs(pairs(student, teacher.ids, teacher_size), pairs(student, student.ids, student_size),
                          pairs(teacher, teacher.ids, teacher_size), student_size, teacher_size);
}

double overlap_at(const ReliabilityFromTopkArgs& args, int64_t n) {
  const int k = static_cast<int>(args.k);
  IdBlocks full_student(k), full_teacher(k);
  if (narrow_full(args.student_topk_ids, args.student_topk_logprobs, n, k, full_student.ids) &&
      narrow_full(args.teacher_topk_ids, args.teacher_topk_logprobs, n, k, full_teacher.ids))
    return overlap_of_narrow(full_student, full_teacher, k, k);

  int64_t student[256], teacher[256];
  const int student_size = filled_ids(args.student_topk_ids, args.student_topk_logprobs, n, k, student);
  const int teacher_size = filled_ids(args.teacher_topk_ids, args.teacher_topk_logprobs, n, k, teacher);
  IdBlocks narrow_student(student_size), narrow_teacher(teacher_size);
  if (narrow_ids(student, student_size, narrow_student.ids) && narrow_ids(teacher, teacher_size, narrow_teacher.ids))
    return overlap_of_narrow(narrow_student, narrow_teacher, student_size, teacher_size);
  const auto pairs = [](const int64_t* ids, int size, const int64_t* among, int count) {
    int equal = 0;
    for (int j = 0; j < size; ++j) equal += static_cast<int>(std::count(among, among + count, ids[j]));
    return equal;
  };
  return overlap_of_pairs(pairs(student, student_size, teacher, teacher_size),
                          pairs(student, student_size, student, student_size),
                          pairs(teacher, teacher_size, teacher, teacher_size), student_size, teacher_size);
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
