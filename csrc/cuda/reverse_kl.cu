#include "gradient.cuh"
#include "operators/reverse_kl.h"

namespace pruneopd::cuda {
namespace {

struct ReverseKl {
  static constexpr Stats kStats = Stats::kReverseKl;
  static constexpr bool kSelects = false;

  Rows<2> rows;
  DeviceView mask, weight;
  ReverseKlArgs::Outputs out;

  __device__ double weight_of(int n) const { return weight ? weight.real(n) : 1; }
  __device__ bool reads(int n) const { return mask.flag(n) && weight_of(n) != 0; }

  __device__ void write_unread(int n) const {
    if (thread_in_block() != 0) return;
    out.loss[n] = 0;
    state_at<DivergenceState>(out.state, n) = {};
  }

  template <class T>
  __device__ void write(int n) const {
    if (thread_in_block() != 0) return;
    const PositionMemory<2>& memory = PositionMemory<2>::get();
    const double kl = memory.summaries.divergences[0];
    const auto loss = static_cast<float>(weight_of(n) * kl);
    auto state =
        DivergenceState::of(memory.summary(rows, 0), memory.summary(rows, 1), kl, memory.summaries.peak_excess);
    if (!std::isfinite(loss)) state.offset = NAN;
    out.loss[n] = loss;
    state_at<DivergenceState>(out.state, n) = state;
  }
};

// ---- Backward: a block takes a position, or a slice of one.

struct BackwardParams {
  Rows<2> rows;
  DeviceView state, scale;
  void* gradient;
  int64_t width;

  __device__ double factor(int n) const { return scale.real(n) / rows.temperatures[0]; }
  __device__ DivergenceState saved(int n) const {
    return {state.real(n, 0), state.real(n, 1), state.real(n, 2), state.real(n, 3), state.real(n, 4)};
  }
  /// In float64, at the position of this block.
  __device__ double at(const float (&logits)[2]) const {
    const int n = rows.position();
    return factor(n) * divergence_gradient(logits[0], logits[1], saved(n), rows.temperatures[0], rows.temperatures[1]);
  }
};

/// p * (log p - log q - KL) times a factor: in float32, in log2 units, rounded the same way wherever it stands.
struct OfDivergence {
  const BackwardParams& params;
  float reference, teacher_reference;
  float student_scale, teacher_scale;  // log2(e) / temperature
  float factor, offset;                // of the logarithms
  bool is_peaked;

  __device__ float of_student(float x) const { return __fmul_rn(x - reference, student_scale); }
  __device__ float of_teacher(float y) const { return __fmul_rn(y - teacher_reference, teacher_scale); }
  __device__ float gradient(float dx, float dy, float e) const {
    const float gradient = __fmul_rn(__fmul_rn(e, factor), __fadd_rn(__fadd_rn(dx, -dy), -offset));
    return e == 0 ? 0 : gradient;
  }
  __device__ bool takes_float64(float dx, float dy) const { return (dx == 0 && is_peaked) || is_beyond(dx, dy); }

  template <int kIds>
  __device__ bool operator()(const float (&logits)[2][kIds], float (&gradients)[kIds]) const {
    float greatest = -1, least = 0;
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      const float dx = of_student(logits[0][i]), dy = of_teacher(logits[1][i]);
      gradients[i] = gradient(dx, dy, exp2_approximately(dx));
      greatest = fmaxf(greatest, dx);
      least = fminf(least, dy);
    }
    if (!(greatest == 0 && is_peaked) && least > kLeast) return false;
    bool again = false;
#pragma unroll
    for (int i = 0; i < kIds; ++i) again |= takes_float64(of_student(logits[0][i]), of_teacher(logits[1][i]));
    return again;
  }
  __device__ float one(const float (&logits)[2]) const {
    const float dx = of_student(logits[0]), dy = of_teacher(logits[1]);
    if (takes_float64(dx, dy)) return static_cast<float>(params.at(logits));
    return gradient(dx, dy, exp2_approximately(dx));
  }
};

/// T: of both rows; G: of the student's.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, true>)) reverse_kl_backward_kernel(BackwardParams params) {
  const int n = params.rows.position();
  const Rows<2>& rows = params.rows;
  const GradientShare<T, G, 2> share(rows, params.gradient, params.width, n);
  const double factor = params.factor(n);
  if (factor == 0) return share.fill(0);
  const DivergenceState state = params.saved(n);
  if (!(std::isfinite(factor) && std::isfinite(state.offset))) return share.fill(NAN);

  const double of_logarithms = factor / state.mass * kLn2;
  if (rows.usable_scales && is_tame(of_logarithms) && is_tame(state.offset) && is_tame(state.teacher_reference))
    share.stream(OfDivergence{params, static_cast<float>(state.reference), static_cast<float>(state.teacher_reference),
                              rows.scales[0], rows.scales[1], static_cast<float>(of_logarithms),
                              static_cast<float>(state.offset / kLn2), state.is_peaked()});
  else
    share.write_singly([&](const float(&logits)[2]) { return params.at(logits); });
}

}  // namespace

template <>
void compute(const ReverseKlArgs& args, const Queue& queue) {
  run_at_positions(args.kName,
                   ReverseKl{make_rows(/*k=*/0, args.student, args.teacher), args.mask, args.weight, args.out},
                   args.positions, queue);
}

template <>
void compute(const ReverseKlBackwardArgs& args, const Queue& queue) {
  const BackwardParams params{make_rows(/*k=*/0, args.student, args.teacher), args.state, args.scale, args.gradient,
                              args.width};
  with_logit_type(params.rows, [&]<class T>() {
    with_logit_type(args.student.rows.type, [&]<class G>() {
      if constexpr (std::is_same_v<T, G> || std::is_same_v<T, AnyLogit>)
        launch_over_gradient<T>(&reverse_kl_backward_kernel<T, G>, args.positions, args.width, /*shared_bytes=*/0,
                                params, queue);
    });
  });
}

}  // namespace pruneopd::cuda
