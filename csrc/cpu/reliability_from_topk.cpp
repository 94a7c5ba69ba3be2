#include "../math/drift.h"
#include "responses.h"
#include "row_pass.h"

namespace pruneopd {
namespace {

void load_ids(const View& ids, int64_t n, int64_t k, int64_t* out) {
  const int64_t offset = ids.at.offset(n);
  for (int64_t j = 0; j < k; ++j) out[j] = load_id(ids, offset + j * ids.step);
}

/// How many of the student's slots hold an id that occurs among the teacher's; ids below 0 match nothing.
int count_common_ids(const int64_t* student, const int64_t* teacher, int64_t k) {
  int32_t narrow_student[256], narrow_teacher[256];
  bool narrow = true;
  for (int64_t j = 0; j < k; ++j) {
    narrow &= student[j] <= INT32_MAX && teacher[j] <= INT32_MAX;
    narrow_student[j] = student[j] < 0 ? -1 : static_cast<int32_t>(student[j]);
    narrow_teacher[j] = teacher[j] < 0 ? -2 : static_cast<int32_t>(teacher[j]);
  }
  if (narrow) return row_kernels().count_common(narrow_student, narrow_teacher, k);
  int count = 0;
  for (int64_t i = 0; i < k; ++i) {
    bool hit = false;
    for (int64_t j = 0; j < k; ++j) hit |= student[i] >= 0 && student[i] == teacher[j];
    count += hit;
  }
  return count;
}

bool rejected(const ReliabilityFromTopkArgs& args, const int64_t* teacher_ids, int64_t n) {
  const int64_t token = load_id(args.token_ids, args.token_ids.at.offset(n));
  const int64_t offset = args.teacher_topk_logprobs.at.offset(n);
  Nucleus nucleus(args.drift_rule.top_p);
  for (int64_t j = 0; j < args.k; ++j) {
    if (teacher_ids[j] < 0) continue;
    nucleus.add(load_real(args.teacher_topk_logprobs, offset + j * args.teacher_topk_logprobs.step),
                teacher_ids[j] == token);
  }
  return !nucleus.accepts();
}

void pass_position(const ReliabilityFromTopkArgs& args, int64_t n) {
  if (!load_flag(args.mask, n)) {
    args.overlap[n] = 0;
    args.drift[n] = false;
    return;
  }
  int64_t student[256], teacher[256];
  load_ids(args.student_topk_ids, n, args.k, student);
  load_ids(args.teacher_topk_ids, n, args.k, teacher);
  const int k = static_cast<int>(args.k), common = count_common_ids(student, teacher, args.k);
  args.overlap[n] = static_cast<float>(overlap_of(common, k));
  args.drift[n] = args.drift_rule.metric == Metric::kOverlap ? drifts_by_overlap(common, k, args.drift_rule.threshold)
                                                             : rejected(args, teacher, n);
}

}  // namespace

void reliability_from_topk(const ReliabilityFromTopkArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.responses.positions, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pass_position(args, n);
  });
  scan_responses(
      args.responses, args.mask, args.scan_rule, args.scan, parallel_for, [&](int64_t n) { return args.drift[n]; },
      [](int64_t, float) {});
}

}  // namespace pruneopd
