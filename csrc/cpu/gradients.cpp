// The gradients of the losses: a row is read and another written. Compiled once for each instruction set
// (PRUNEOPD_ISA).
#include "row_pass.h"
#include "steps.h"

namespace pruneopd::PRUNEOPD_ISA {
namespace {

/// Whether a number, its differences to others and its products with exponentials stay far from the ends of float32:
/// what is left of a greater one may still be one.
PRUNEOPD_INLINE bool is_tame(double number) { return number > -1e30 && number < 1e30; }

template <bool kStream, bool kInOrder, class T>
PRUNEOPD_INLINE void store_step(T* p, const Vec (&v)[2]) {
  if constexpr (!kInOrder && std::is_same_v<T, BFloat16>)
    store_even_odd<kStream>(p, v[0], v[1]);
  else
    store_two<kStream>(p, v);
}

/// One row's gradient: `gradient(i, v, rows + i...)` sets v to that of the step that begins at id i. The last, short
/// step is computed of padded copies.
template <bool kInOrder, class T, class Gradient, class... Rows>
PRUNEOPD_INLINE void write_row(int64_t vocab_size, T* out, const Gradient& gradient, const Rows*... rows) {
  const int64_t whole = vocab_size / kStep * kStep;
  Vec v[2];
  const auto write = [&]<bool kStream>() __attribute__((always_inline)) {
    for (int64_t i = 0; i < whole; i += kStep) {
      (prefetch_ahead(rows + i), ...);
      gradient(i, v, rows + i...);
      store_step<kStream, kInOrder>(out + i, v);
    }
  };
  if (reinterpret_cast<uintptr_t>(out) % sizeof(Vec) == 0) {
    write.template operator()<true>();
    finish_stream();
  } else {
    write.template operator()<false>();
  }
  if (whole == vocab_size) return;
  gradient(whole, v, Padded<Rows, kStep>(rows + whole, vocab_size - whole).data...);
  T rest[kStep];
  store_step<false, kInOrder>(rest, v);
  __builtin_memcpy(out + whole, rest, static_cast<size_t>(vocab_size - whole) * sizeof(T));
}

/// What was not written as it should be.
struct Exceptions {
  bool lost = false;       // the row is to be computed in float64
  int64_t peak_step = -1;  // with kPeaked: where the logit lies that is the reference
};

/// total * e * (log p - log q - KL), with p = e / mass.
template <bool kPeaked, class TX, class TY>
Exceptions write_divergence_gradient(const TX* x, const TY* y, int64_t vocab_size, const DivergenceState& state,
                                     double student_temperature, double teacher_temperature, double total, TX* out) {
  constexpr bool kInOrder = !std::is_same_v<TX, TY>;  // the two rows must agree
  const auto reference = static_cast<float>(state.reference);
  const auto teacher_reference = static_cast<float>(state.teacher_reference);
  const float scale = log2_scale(student_temperature), teacher_scale = log2_scale(teacher_temperature);
  const Vec limit = broadcast(limit_of_products(scale, teacher_scale));
  const Vec factor = broadcast(static_cast<float>(total)), offset = broadcast(static_cast<float>(-state.offset));
  const Vec of_x = broadcast(static_cast<float>(1 / student_temperature));
  const Vec of_y = broadcast(static_cast<float>(-1 / teacher_temperature));
  Exceptions found;
  const auto gradient = [&](int64_t i, Vec(&v)[2], const TX* from_x, const TY* from_y) __attribute__((always_inline)) {
    Vec dx[2], dy[2], e[2];
    const Vec scales[2] = {broadcast(scale), broadcast(scale)};
    load_two<kInOrder>(from_x, dx);
    load_two<kInOrder>(from_y, dy);
    for (int j = 0; j < 2; ++j) {
      dx[j] -= broadcast(reference);
      dy[j] -= broadcast(teacher_reference);
    }
    if constexpr (kPeaked)
      if (at_least(max(dx[0], dx[1]), broadcast(0))) [[unlikely]]
        found.peak_step = i;
    if (!all_below(fma(dx[0], dy[0], dx[1] * dy[1]), limit)) [[unlikely]]
      found.lost |= loses_terms(from_x, from_y, kStep, reference, teacher_reference, scale, teacher_scale);
    exp2_scaled<false>(dx, scales, e);
    for (int j = 0; j < 2; ++j) {
      const Vec excess = fma(dy[j], of_y, fma(dx[j], of_x, offset));
      v[j] = where_nonzero(e[j], e[j] * factor * excess);
    }
  };
  write_row<kInOrder>(vocab_size, out, gradient, x, y);
  return found;
}

/// e * (of_e + slope * (x - reference)).
template <bool kSlopes, class T>
void write_softmax_gradient(const T* x, int64_t vocab_size, float reference, float scale, float of_e, float slope,
                            T* out) {
  const auto gradient = [&](int64_t, Vec(&v)[2], const T* from) __attribute__((always_inline)) {
    Vec d[2], e[2];
    const Vec scales[2] = {broadcast(scale), broadcast(scale)};
    load_two<false>(from, d);
    for (Vec& one : d) one -= broadcast(reference);
    exp2_scaled<false>(d, scales, e);
    for (int j = 0; j < 2; ++j)
      v[j] =
          kSlopes ? where_nonzero(e[j], e[j] * fma(d[j], broadcast(slope), broadcast(of_e))) : e[j] * broadcast(of_e);
  };
  write_row<false>(vocab_size, out, gradient, x);
}

}  // namespace

void softmax_gradient(const Row& row, int64_t vocab_size, const RowState& state, double total, double entropy,
                      void* out) {
  // p * (total + entropy * (d - mean)) = e * (of_e + slope * (x - reference))
  const double share = entropy / state.mass, slope = share / row.temperature;
  const double of_e = total / state.mass - share * state.mean;
  const float scale = log2_scale(row.temperature);
  if (!is_usable_scale(scale) || !is_tame(state.reference) || !is_tame(of_e) || !is_tame(share) || !is_tame(slope))
    return softmax_gradient_exact(row, vocab_size, state, total, entropy, out);
  with_logits(row.logits, row.type, [&]<class T>(const T* x) {
    const auto write = slope == 0 ? write_softmax_gradient<false, T> : write_softmax_gradient<true, T>;
    write(x, vocab_size, static_cast<float>(state.reference), scale, static_cast<float>(of_e),
          static_cast<float>(slope), static_cast<T*>(out));
  });
}

void divergence_gradient(const Row& student, const Row& teacher, int64_t vocab_size, const DivergenceState& state,
                         double factor, void* out) {
  const double t = student.temperature, u = teacher.temperature, total = factor / state.mass;
  const auto exactly = [&] { divergence_gradient_exact(student, teacher, vocab_size, state, factor, out); };
  if (!is_usable_scale(log2_scale(t)) || !is_usable_scale(log2_scale(u)) || !is_tame(state.reference) ||
      !is_tame(state.teacher_reference) || !is_tame(state.offset) || !is_tame(total))
    return exactly();
  with_logits(student, teacher, [&]<class TX, class TY>(const TX* x, const TY* y) {
    TX* const row = static_cast<TX*>(out);
    const Exceptions found = state.is_peaked()
                                 ? write_divergence_gradient<true>(x, y, vocab_size, state, t, u, total, row)
                                 : write_divergence_gradient<false>(x, y, vocab_size, state, t, u, total, row);
    if (found.lost) return exactly();
    if (found.peak_step < 0) return;  // or this part of the vocabulary does not hold it
    for (int64_t i = found.peak_step; i < found.peak_step + kStep && i < vocab_size; ++i)
      if (to_float(x[i]) == state.reference) row[i] = from_float<TX>(static_cast<float>(total * state.peak_excess));
  });
}

}  // namespace pruneopd::PRUNEOPD_ISA
