// The gradients of the losses: a row is read and another written. Compiled once for each instruction set
// (PRUNEOPD_ISA).
#include "row_pass.h"
#include "steps.h"

namespace pruneopd::PRUNEOPD_ISA {
namespace {

/// Whether differences to a reference neither overflow nor leave the scale's range.
PRUNEOPD_INLINE bool is_tame(float reference, float scale) {
  return reference > -1e30f && reference < 1e30f && is_usable_scale(scale);
}

/// Whether what exponentials are multiplied by is a float32: beyond, the product with a small one may still be one.
PRUNEOPD_INLINE bool is_tame(double total) { return total > -1e30 && total < 1e30; }

/// The end of a row.
template <class T>
using PaddedStep = Padded<T, kStep>;

/// Whether whole vectors may be written past the caches from there on.
PRUNEOPD_INLINE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % (sizeof(Vec)) == 0; }

template <bool kStream, bool kInOrder, class T>
PRUNEOPD_INLINE void store_step(T* p, const Vec (&v)[2]) {
  if constexpr (!kInOrder && std::is_same_v<T, BFloat16>)
    store_even_odd<kStream>(p, v[0], v[1]);
  else
    store_two<kStream>(p, v);
}

/// One row's gradient, `gradient(i, v)` of the step that begins at id i. The last, short one is computed of padded
/// copies.
template <bool kInOrder, class T, class Gradient, class LastGradient>
PRUNEOPD_INLINE void write_row(int64_t vocab_size, T* out, const Gradient& gradient, const LastGradient& last) {
  const int64_t whole = vocab_size / kStep * kStep;
  const auto write = [&]<bool kStream>() __attribute__((always_inline)) {
    for (int64_t i = 0; i < whole; i += kStep) {
      Vec v[2];
      gradient(i, v);
      store_step<kStream, kInOrder>(out + i, v);
    }
  };
  if (is_aligned(out)) {
    write.template operator()<true>();
    finish_stream();
  } else {
    write.template operator()<false>();
  }
  if (whole == vocab_size) return;
  Vec v[2];
  last(whole, v);
  T rest[kStep];
  store_step<false, kInOrder>(rest, v);
  __builtin_memcpy(out + whole, rest, static_cast<size_t>(vocab_size - whole) * sizeof(T));
}

/// total * e * (log p - log q - KL), with p = e / mass. kPeaked: also where the logit lies that is the reference, else
/// -1.
template <bool kPeaked, class TX, class TY>
int64_t write_divergence_gradient(const TX* x, const TY* y, int64_t vocab_size, const DivergenceState& state,
                                  double student_temperature, double teacher_temperature, double total, TX* out) {
  constexpr bool kInOrder = !std::is_same_v<TX, TY>;  // the two rows must agree
  const Vec scale = broadcast(log2_scale(student_temperature)), factor = broadcast(static_cast<float>(total));
  const Vec of_x = broadcast(static_cast<float>(1 / student_temperature));
  const Vec of_y = broadcast(static_cast<float>(-1 / teacher_temperature));
  int64_t peak_step = -1;
  const auto gradient = [&](int64_t i, const TX* from_x, const TY* from_y, Vec(&v)[2]) __attribute__((always_inline)) {
    Vec dx[2], dy[2], e[2];
    const Vec scales[2] = {scale, scale};
    load_two<kInOrder>(from_x, dx);
    load_two<kInOrder>(from_y, dy);
    for (int j = 0; j < 2; ++j) {
      dx[j] = sub(dx[j], broadcast(state.reference));
      dy[j] = sub(dy[j], broadcast(state.teacher_reference));
    }
    if constexpr (kPeaked)
      if (at_least(max(dx[0], dx[1]), broadcast(0))) [[unlikely]]
        peak_step = i;
    exp2_scaled<false>(dx, scales, e);
    for (int j = 0; j < 2; ++j) {
      const Vec excess = fma(dy[j], of_y, fma(dx[j], of_x, broadcast(-state.offset)));
      v[j] = where_nonzero(e[j], mul(mul(e[j], factor), excess));
    }
  };
  write_row<kInOrder>(
      vocab_size, out,
      [&](int64_t i, Vec(&v)[2]) __attribute__((always_inline)) {
        prefetch_ahead(x + i);
        prefetch_ahead(y + i);
        gradient(i, x + i, y + i, v);
      },
      [&](int64_t i, Vec(&v)[2]) __attribute__((always_inline)) {
        const PaddedStep<TX> rest_x(x + i, vocab_size - i);
        const PaddedStep<TY> rest_y(y + i, vocab_size - i);
        gradient(i, rest_x.data, rest_y.data, v);
      });
  if (peak_step < 0) return -1;
  for (int64_t i = peak_step; i < peak_step + kStep && i < vocab_size; ++i)
    if (to_float(x[i]) == state.reference) return i;
  return -1;  // these are not the logits that the state is of
}

}  // namespace

void scaled_softmax(const Row& row, int64_t vocab_size, const RowState& state, double factor, void* out) {
  const float scale = log2_scale(row.temperature);
  const double total = factor / state.mass;
  if (!is_tame(state.reference, scale) || !is_tame(total))
    return scaled_softmax_exact(row, vocab_size, state, factor, out);
  const Vec factors = broadcast(static_cast<float>(total));
  with_logits(row.logits, row.type, [&]<class T>(const T* x) {
    const auto gradient = [&](const T* from, Vec(&v)[2]) __attribute__((always_inline)) {
      Vec d[2], e[2];
      const Vec scales[2] = {broadcast(scale), broadcast(scale)};
      load_two<false>(from, d);
      for (Vec& one : d) one = sub(one, broadcast(state.reference));
      exp2_scaled<false>(d, scales, e);
      for (int j = 0; j < 2; ++j) v[j] = mul(factors, e[j]);
    };
    write_row<false>(
        vocab_size, static_cast<T*>(out),
        [&](int64_t i, Vec(&v)[2]) __attribute__((always_inline)) {
          prefetch_ahead(x + i);
          gradient(x + i, v);
        },
        [&](int64_t i, Vec(&v)[2]) __attribute__((always_inline)) {
          const PaddedStep<T> rest(x + i, vocab_size - i);
          gradient(rest.data, v);
        });
  });
}

void divergence_gradient(const Row& student, const Row& teacher, int64_t vocab_size, const DivergenceState& state,
                         double factor, void* out) {
  const double total = factor / state.mass;
  if (!is_tame(state.reference, log2_scale(student.temperature)) ||
      !is_tame(state.teacher_reference, log2_scale(teacher.temperature)) || !is_tame(total))
    return divergence_gradient_exact(student, teacher, vocab_size, state, factor, out);
  with_logits(student, teacher, [&]<class TX, class TY>(const TX* x, const TY* y) {
    const double t = student.temperature, u = teacher.temperature;
    TX* const row = static_cast<TX*>(out);
    if (!state.is_peaked()) {
      write_divergence_gradient<false>(x, y, vocab_size, state, t, u, total, row);
      return;
    }
    const int64_t peak = write_divergence_gradient<true>(x, y, vocab_size, state, t, u, total, row);
    if (peak < 0) return;  // this part of the vocabulary does not hold it
    row[peak] = from_float<TX>(static_cast<float>(total * state.peak_excess));
  });
}

}  // namespace pruneopd::PRUNEOPD_ISA
