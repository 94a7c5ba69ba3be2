// topk_forward_kl: a block takes a position, or a slice of one.
#include "../math/drift.h"
#include "operators/topk_forward_kl.h"
#include "position.cuh"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<1> rows;
  DeviceView mask, teacher_topk_ids, teacher_topk_logprobs;
  double logprob_min;
  TopkForwardKlArgs::Outputs out;
};

__device__ void write_masked(const Params& params, int n) {
  for (int j = thread_in_block(); j < params.rows.k; j += kThreads) {
    params.out.student_topk_ids[params.rows.slot(n, j)] = j;
    params.out.coefficients[params.rows.slot(n, j)] = 0;
  }
  if (thread_in_block() != 0) return;
  params.out.loss[n] = params.out.student_mass[n] = params.out.teacher_mass[n] = 0;
  params.out.overlap[n] = params.out.overlap_token_advantage[n] = 0;
  state_at<RowState>(params.out.state, n) = {};
}

/// At most one candidate of either side a thread.
template <class T>
__device__ void write_position(const Params& params, int n) {
  static_assert(kMaxCandidates <= kThreads);
  PositionMemory<1>& memory = PositionMemory<1>::get();
  const Rows<1>& rows = params.rows;
  const int k = rows.k, j = thread_in_block();
  const int64_t teacher_id = j < k ? params.teacher_topk_ids.id(n, j) : -1;
  const int student_id = j < k ? memory.id(0, j) : -1, mine = teacher_id < rows.vocab_size ? teacher_id : -1;
  if (j < k) memory.ids[j] = mine;
  __syncthreads();
  bool hit = false, shared = false;  // whether the student's candidate j is one of the teacher's, and the reverse
  for (int i = 0; i < k; ++i) {
    hit |= memory.ids[i] == student_id;
    shared |= memory.id(0, i) == mine;
  }
  const int hits = __syncthreads_count(hit && j < k), shared_slots = __syncthreads_count(shared);

  LossTerm term;
  double sums[4] = {};  // the loss, the masses of student and teacher, the advantages
  if (teacher_id >= 0) {
    const double p = candidate_logprob<T>(rows, memory, teacher_id), q = params.teacher_topk_logprobs.real(n, j);
    term = forward_kl_term(p, q, params.logprob_min);
    sums[0] = term.value;
    sums[1] = exp(p);
    sums[2] = exp(q);
    sums[3] = shared ? -term.value : 0;
  }
  sum_over_block(sums, memory.summaries.of_warps);
  const bool broken = memory.broken();
  const float loss = broken ? NAN : static_cast<float>(sums[0]);
  if (j < k) {
    params.out.student_topk_ids[rows.slot(n, j)] = student_id;
    params.out.coefficients[rows.slot(n, j)] = std::isfinite(loss) ? static_cast<float>(term.derivative) : NAN;
  }
  if (j != 0) return;
  params.out.loss[n] = loss;
  params.out.student_mass[n] = broken ? NAN : static_cast<float>(sums[1]);
  params.out.teacher_mass[n] = static_cast<float>(sums[2]);
  params.out.overlap[n] = static_cast<float>(overlap_of(broken ? 0 : hits, k));
  params.out.overlap_token_advantage[n] = broken ? NAN : static_cast<float>(sums[3] / max(shared_slots, 1));
  state_at<RowState>(params.out.state, n) = RowState::of(memory.summary(rows, 0));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) topk_forward_kl_kernel(Params params) {
  const int n = params.rows.position();
  if (!params.mask.flag(n)) {
    if (params.rows.slice() == 0) write_masked(params, n);
  } else if (pass_position<T, Stats::kNone, /*kSelects=*/true>(params.rows, n)) {
    write_position<T>(params, PositionMemory<1>::get().position);
  }
}

}  // namespace

template <>
void compute(const TopkForwardKlArgs& args, const Queue& queue) {
  const Params params{make_rows(args.k, args.student), args.mask,        args.teacher_topk_ids,
                      args.teacher_topk_logprobs,      args.logprob_min, args.out};
  with_logit_type(args.student.rows.type, [&]<class T>() {
    launch_over_logits<T>(&topk_forward_kl_kernel<T>, args.kName, args.positions, /*responses=*/0, params, queue);
  });
}

}  // namespace pruneopd::cuda
