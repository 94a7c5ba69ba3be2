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

double overlap_at(const ReliabilityFromTopkArgs& args, int64_t n) {
  int64_t student[256], teacher[256];
  const int student_size = filled_ids(args.student_topk_ids, args.student_topk_logprobs, n, args.k, student);
  const int teacher_size = filled_ids(args.teacher_topk_ids, args.teacher_topk_logprobs, n, args.k, teacher);
  IdBlocks narrow_student(student_size);
  int32_t narrow_teacher[256];
  int common = 0;
  if (narrow_ids(student, student_size, narrow_student.ids) && narrow_ids(teacher, teacher_size, narrow_teacher))
    common = row_kernels().count_common(narrow_student, narrow_teacher, teacher_size);
  else
    for (int j = 0; j < student_size; ++j)
      common += std::find(teacher, teacher + teacher_size, student[j]) != teacher + teacher_size;
  return overlap_of(common, student_size, teacher_size);
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
