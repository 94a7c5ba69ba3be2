#include "operators/reliability_from_topk.h"

#include "../math/drift.h"
#include "responses.h"
#include "row_pass.h"

namespace pruneopd {
namespace {

/// The k ids of position n as int32, `padding` for those below 0. False: one of them does not fit.
template <class T>
bool narrow_ids(const View& ids, int64_t n, int64_t k, int32_t padding, int32_t* out) {
  const T* at = static_cast<const T*>(ids.data) + ids.at.offset(n);
  int64_t all = 0;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t id = at[j * ids.step];
    all |= id < 0 ? 0 : id;
    out[j] = id < 0 ? padding : static_cast<int32_t>(id);
  }
  return all <= INT32_MAX;
}

bool narrow_ids(const View& ids, int64_t n, int64_t k, int32_t padding, int32_t* out) {
  return ids.type == Scalar::kI32 ? narrow_ids<int32_t>(ids, n, k, padding, out)
                                  : narrow_ids<int64_t>(ids, n, k, padding, out);
}

/// How many of the student's slots hold an id that occurs among the teacher's; ids below 0 match nothing.
int count_common_ids(const ReliabilityFromTopkArgs& args, int64_t n) {
  IdBlocks student(args.k);
  int32_t teacher[256];
  if (narrow_ids(args.student_topk_ids, n, args.k, -1, student.ids) &&
      narrow_ids(args.teacher_topk_ids, n, args.k, -2, teacher))
    return row_kernels().count_common(student, teacher, args.k);
  int count = 0;
  for (int64_t i = 0; i < args.k; ++i) {
    const int64_t id = id_at(args.student_topk_ids, n, i);
    bool hit = false;
    for (int64_t j = 0; j < args.k; ++j) hit |= id >= 0 && id == id_at(args.teacher_topk_ids, n, j);
    count += hit;
  }
  return count;
}

bool rejected(const ReliabilityFromTopkArgs& args, int64_t n) {
  const int64_t token = id_at(args.token_ids, n);
  Nucleus nucleus(args.drift_rule.top_p);
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t id = id_at(args.teacher_topk_ids, n, j);
    if (id >= 0) nucleus.add(real_at(args.teacher_topk_logprobs, n, j), id == token);
  }
  return !nucleus.accepts();
}

void pass_position(const ReliabilityFromTopkArgs& args, int64_t n) {
  if (!load_flag(args.mask, n)) {
    args.out.overlap[n] = 0;
    args.out.drift[n] = false;
    return;
  }
  const int k = static_cast<int>(args.k), common = count_common_ids(args, n);
  args.out.overlap[n] = static_cast<float>(overlap_of(common, k));
  args.out.drift[n] = args.drift_rule.metric == Metric::kOverlap
                          ? drifts_by_overlap(common, k, args.drift_rule.threshold)
                          : rejected(args, n);
}

}  // namespace

template <>
void compute(const ReliabilityFromTopkArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.responses.positions, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pass_position(args, n);
  });
  scan_responses(args.responses, args.mask, view_of_flags(args.out.drift, args.responses.positions), args.scan_rule,
                 args.out.scan, parallel_for, [](int64_t, int64_t) {});
}

}  // namespace pruneopd
