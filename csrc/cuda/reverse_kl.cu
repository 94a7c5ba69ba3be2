// reverse_kl: a block takes a position, or a slice of one; so does its backward pass.
#include "gradient.cuh"
#include "operators/reverse_kl.h"

namespace pruneopd::cuda {
namespace {

struct Params {
  Rows<2> rows;
  DeviceView mask, weight;
  ReverseKlArgs::Outputs out;
};

__device__ void write_position(const Params& params, int n, double weight) {
  if (thread_in_block() != 0) return;
  const PositionMemory<2>& memory = PositionMemory<2>::get();
  const double kl = memory.summaries.divergences[0];
  const auto loss = static_cast<float>(weight * kl);
  auto state = DivergenceState::of(memory.summary(params.rows, 0), memory.summary(params.rows, 1), kl,
                                   memory.summaries.peak_excess);
  if (!std::isfinite(loss)) state.offset = NAN;
  params.out.loss[n] = loss;
  state_at<DivergenceState>(params.out.state, n) = state;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) reverse_kl_kernel(Params params) {
  const int n = params.rows.position();
  const double weight = params.weight ? params.weight.real(n) : 1;
  if (!params.mask.flag(n) || weight == 0) {
    if (params.rows.slice() != 0 || thread_in_block() != 0) return;
    params.out.loss[n] = 0;
    state_at<DivergenceState>(params.out.state, n) = {};
  } else if (pass_position<T, Stats::kReverseKl, /*kSelects=*/false>(params.rows, n)) {
    write_position(params, PositionMemory<2>::get().position, weight);
  }
}

// ---- Backward.

struct BackwardParams {
  Rows<2> rows;
  DeviceView state, scale;
  void* gradient;
  int64_t width;
};

/// p * (log p - log q - KL) times a factor: in float32, in log2 units, rounded the same way wherever it stands.
struct OfDivergence {
  float reference, teacher_reference;
  float student_scale, teacher_scale;  // log2(e) / temperature
  float factor, offset;                // of the logarithms
  bool is_peaked;
  float of_peak;  // the gradient there

  __device__ float operator()(float x, float y, float& e) const {
    const float dx = __fmul_rn(x - reference, student_scale), dy = __fmul_rn(y - teacher_reference, teacher_scale);
    e = exp2_approximately(dx);
    const float gradient = __fmul_rn(__fmul_rn(e, factor), __fadd_rn(__fadd_rn(dx, -dy), -offset));
    return e == 0 ? 0 : gradient;
  }
  /// Returns whether the peak may be here.
  template <int kIds>
  __device__ bool operator()(const float (&logits)[2][kIds], float (&gradients)[kIds]) const {
    float greatest = 0;
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      float e;
      gradients[i] = (*this)(logits[0][i], logits[1][i], e);
      greatest = fmaxf(greatest, e);
    }
    return greatest == 1 && is_peaked;
  }
  __device__ float one(const float (&logits)[2]) const {
    float e;
    return is_peaked && logits[0] == reference ? of_peak : (*this)(logits[0], logits[1], e);
  }
};

/// The same in float64.
__device__ float divergence_gradient(const float (&logits)[2], const Rows<2>& rows, const DivergenceState& state,
                                     double scale) {
  const double log_p = (static_cast<double>(logits[0]) - state.reference) / rows.temperatures[0];
  const double log_q = (static_cast<double>(logits[1]) - state.teacher_reference) / rows.temperatures[1];
  const double p = exp(log_p) / state.mass;
  const bool is_peak = state.is_peaked() && logits[0] == state.reference;
  const double excess = is_peak ? state.peak_excess : log_p - log_q - state.offset;
  return p == 0 ? 0 : static_cast<float>(scale * (p * excess));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    reverse_kl_backward_kernel(BackwardParams params) {
  const int n = params.rows.position();
  const Rows<2>& rows = params.rows;
  const GradientShare<T, 2> share(rows, params.gradient, rows.logits[0].type, params.width, n);
  const double scale = params.scale.real(n) / rows.temperatures[0];
  if (scale == 0) return share.fill(0);
  const auto saved = [&](int i) { return static_cast<float>(params.state.real(n, i)); };
  const DivergenceState state{saved(0), saved(1), saved(2), saved(3), saved(4)};
  if (!(std::isfinite(scale) && std::isfinite(state.offset))) return share.fill(NAN);

  const OfDivergence gradient{state.reference,
                              state.teacher_reference,
                              rows.scales[0],
                              rows.scales[1],
                              static_cast<float>(scale / state.mass * kLn2),
                              static_cast<float>(state.offset / kLn2),
                              state.is_peaked(),
                              static_cast<float>(scale / state.mass * state.peak_excess)};
  if (rows.usable_scales && std::isfinite(gradient.factor) && std::isfinite(gradient.offset) &&
      fabsf(state.teacher_reference) < kFarthestReference)
    share.stream(gradient);
  else
    share.write_singly([&](const float(&logits)[2]) { return divergence_gradient(logits, rows, state, scale); });
}

}  // namespace

template <>
void compute(const ReverseKlArgs& args, const Queue& queue) {
  const Params params{make_rows(/*k=*/0, args.student, args.teacher), args.mask, args.weight, args.out};
  with_logit_type(args.student, args.teacher, [&]<class T>() {
    launch_over_logits<T>(&reverse_kl_kernel<T>, args.kName, args.positions, /*responses=*/0, params, queue);
  });
}

template <>
void compute(const ReverseKlBackwardArgs& args, const Queue& queue) {
  const BackwardParams params{make_rows(/*k=*/0, args.student, args.teacher), args.state, args.scale, args.gradient,
                              args.width};
  with_logit_type(args.student, args.teacher, [&]<class T>() {
    launch_over_gradient<T>(&reverse_kl_backward_kernel<T>, args.positions, args.width, /*shared_bytes=*/0, params,
                            queue);
  });
}

}  // namespace pruneopd::cuda
