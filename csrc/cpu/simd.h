// Vectors of floats for one instruction set, chosen by PRUNEOPD_ISA (avx512, avx2 or portable) and kept in a namespace
// of that name. Include it only from a source that is compiled once for each instruction set.
//
// Nothing here may instantiate a template of the standard library: the linker keeps one copy of such a function for the
// whole program, and it could be the one compiled for a processor that the user does not have.
#pragma once

#include <cstdint>

#include "scalars.h"

#define PRUNEOPD_LEVEL_portable 0
#define PRUNEOPD_LEVEL_avx2 1
#define PRUNEOPD_LEVEL_avx512 2
#define PRUNEOPD_CONCAT_(a, b) a##b
#define PRUNEOPD_CONCAT(a, b) PRUNEOPD_CONCAT_(a, b)
#define PRUNEOPD_LEVEL PRUNEOPD_CONCAT(PRUNEOPD_LEVEL_, PRUNEOPD_ISA)

#if PRUNEOPD_LEVEL > 0
#include <immintrin.h>
#endif

#define PRUNEOPD_INLINE inline __attribute__((always_inline))

namespace pruneopd::PRUNEOPD_ISA {

#if PRUNEOPD_LEVEL == 2
using Vec = __m512;
#elif PRUNEOPD_LEVEL == 1
using Vec = __m256;
#else
typedef float Vec __attribute__((vector_size(16)));
#endif
constexpr int kLanes = sizeof(Vec) / sizeof(float);
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;
typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));          // shifts and sums of any bits are defined
typedef uint16_t HalfBits __attribute__((vector_size(sizeof(Vec) / 2)));  // a vector in a type of 16 bits
typedef float HalfVec __attribute__((vector_size(sizeof(Vec) / 2)));
typedef double Doubles __attribute__((vector_size(sizeof(Vec))));

constexpr float kNegativeInfinity = -__builtin_inff();

PRUNEOPD_INLINE Vec broadcast(float x) { return x - Vec{}; }  // not a sum: -0 + 0 is 0

template <class Vector>
PRUNEOPD_INLINE Vector load_bits(const void* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
/// The even and the odd elements of 2 * kLanes: cheaper than two loads in order. On a big-endian machine the odd come
/// first: the order does not matter, only that both rows share it.
PRUNEOPD_INLINE void load_even_odd(const BFloat16* p, Vec& even, Vec& odd) {
  const Bits both = load_bits<Bits>(p);
  even = Vec(both << 16);
  odd = Vec(both & 0xffff0000u);
}
/// v, but +0 where test is 0 (a NaN is not).
PRUNEOPD_INLINE Vec where_nonzero(Vec test, Vec v) { return test != Vec{} ? v : Vec{}; }
/// v, but +0 where test is -inf.
PRUNEOPD_INLINE Vec where_above_negative_infinity(Vec test, Vec v) {
  return test != broadcast(kNegativeInfinity) ? v : Vec{};
}
/// To bfloat16, to nearest even, in the upper half of each lane; for what is no NaN.
PRUNEOPD_INLINE Bits round_to_bfloat16(Vec v) {
  const Bits bits = Bits(v);
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

/// 2**(j/32) as a float32, with j taken out of its exponent field.
constexpr uint32_t kPowers[32] = {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
                                  0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
                                  0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
                                  0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
                                  0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

// What each instruction set has of its own:
// - load and round_to of half precision
// - fma; max, which is b where a is NaN
// - at_least: one bit a lane, a >= b; all_below: whether every lane of a is below b
// - max_lane, sum_lanes
// - stream: a store past the caches, to an address of whole vectors; finish_stream makes it visible to other threads
// - for exp2_scaled: kMagic, whose last bit is worth the distance of the powers that find_power looks up; a polynomial,
//   minimax in relative error up to half that distance and tied to 1 at 0, without its last coefficient, 1
#if PRUNEOPD_LEVEL == 2

PRUNEOPD_INLINE Vec load(const Half* p) { return _mm512_cvtph_ps(load_bits<__m256i>(p)); }
PRUNEOPD_INLINE HalfBits round_to(const Half*, Vec v) {
  return HalfBits(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PRUNEOPD_INLINE Bits widen(HalfBits v) { return Bits(_mm512_cvtepu16_epi32(__m256i(v))); }
PRUNEOPD_INLINE HalfBits narrow(Bits v) { return HalfBits(_mm512_cvtepi32_epi16(__m512i(v))); }
PRUNEOPD_INLINE Doubles to_double(HalfVec v) { return _mm512_cvtps_pd(v); }
PRUNEOPD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PRUNEOPD_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PRUNEOPD_INLINE uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
PRUNEOPD_INLINE bool all_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) == 0; }
PRUNEOPD_INLINE float max_lane(Vec a) { return _mm512_reduce_max_ps(a); }
PRUNEOPD_INLINE float sum_lanes(Vec a) { return _mm512_reduce_add_ps(a); }
PRUNEOPD_INLINE void stream(void* p, Bits v) { _mm512_stream_si512(static_cast<__m512i*>(p), __m512i(v)); }
PRUNEOPD_INLINE void stream(void* p, HalfBits v) { _mm256_stream_si256(static_cast<__m256i*>(p), __m256i(v)); }
PRUNEOPD_INLINE void finish_stream() { _mm_sfence(); }

constexpr float kMagic = 0x1.8p18f;                                           // 1/32
constexpr float kPolynomial[] = {0.24022649228572845f, 0.6931573152542114f};  // 5.3e-8
PRUNEOPD_INLINE Bits find_power(Bits n) {
  const auto first = load_bits<__m512i>(kPowers), second = load_bits<__m512i>(kPowers + 16);
  return Bits(_mm512_permutex2var_epi32(first, __m512i(n), second)) + (n << 18);
}

#elif PRUNEOPD_LEVEL == 1

PRUNEOPD_INLINE Vec load(const Half* p) { return _mm256_cvtph_ps(load_bits<__m128i>(p)); }
PRUNEOPD_INLINE HalfBits round_to(const Half*, Vec v) {
  return HalfBits(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PRUNEOPD_INLINE Bits widen(HalfBits v) { return Bits(_mm256_cvtepu16_epi32(__m128i(v))); }
PRUNEOPD_INLINE HalfBits narrow(Bits v) {
  const auto low_and_high = __m256i(v);
  return HalfBits(_mm_packus_epi32(_mm256_castsi256_si128(low_and_high), _mm256_extracti128_si256(low_and_high, 1)));
}
PRUNEOPD_INLINE Doubles to_double(HalfVec v) { return _mm256_cvtps_pd(v); }
PRUNEOPD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PRUNEOPD_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PRUNEOPD_INLINE uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
PRUNEOPD_INLINE bool all_below(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) == 0; }
PRUNEOPD_INLINE float max_lane(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
PRUNEOPD_INLINE float sum_lanes(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PRUNEOPD_INLINE void stream(void* p, Bits v) { _mm256_stream_si256(static_cast<__m256i*>(p), __m256i(v)); }
PRUNEOPD_INLINE void stream(void* p, HalfBits v) { _mm_stream_si128(static_cast<__m128i*>(p), __m128i(v)); }
PRUNEOPD_INLINE void finish_stream() { _mm_sfence(); }

constexpr float kMagic = 0x1.8p20f;                                                               // 1/8
constexpr float kPolynomial[] = {0.0554962232708931f, 0.2402576357126236f, 0.6931472420692444f};  // 2.5e-8
PRUNEOPD_INLINE Bits find_power(Bits n) {
  const Bits table = {kPowers[0],  kPowers[4],  kPowers[8],  kPowers[12],
                      kPowers[16], kPowers[20], kPowers[24], kPowers[28]};
  return Bits(_mm256_permutevar8x32_epi32(__m256i(table), __m256i(n))) + (n << 20);
}

#else

PRUNEOPD_INLINE Vec load(const Half* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
PRUNEOPD_INLINE HalfBits round_to(const Half*, Vec v) {
  HalfBits bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = from_float<Half>(v[i]).bits;
  return bits;
}
PRUNEOPD_INLINE Bits widen(HalfBits v) { return __builtin_convertvector(v, Bits); }
PRUNEOPD_INLINE HalfBits narrow(Bits v) { return __builtin_convertvector(v, HalfBits); }
PRUNEOPD_INLINE Doubles to_double(HalfVec v) { return __builtin_convertvector(v, Doubles); }
PRUNEOPD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PRUNEOPD_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
PRUNEOPD_INLINE uint32_t at_least(Vec a, Vec b) {
  const auto mask = a >= b;
  return static_cast<uint32_t>((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
}
PRUNEOPD_INLINE bool all_below(Vec a, Vec b) {
  const auto mask = a < b;
  return mask[0] & mask[1] & mask[2] & mask[3];
}
PRUNEOPD_INLINE float max_lane(Vec a) {
  const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}
PRUNEOPD_INLINE float sum_lanes(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
template <class Vector>
PRUNEOPD_INLINE void stream(void* p, Vector v) {
  __builtin_memcpy(p, &v, sizeof v);
}
PRUNEOPD_INLINE void finish_stream() {}

constexpr float kMagic = 0x1.8p23f;  // 1
constexpr float kPolynomial[] = {0.0013274633092805743f, 0.009671961888670921f, 0.055506784468889236f,
                                 0.24022234976291656f, 0.6931470632553101f};  // 8.1e-8
PRUNEOPD_INLINE Bits find_power(Bits n) { return kPowers[0] + (n << 23); }

#endif

PRUNEOPD_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }
PRUNEOPD_INLINE Vec load(const BFloat16* p) { return Vec(widen(load_bits<HalfBits>(p)) << 16); }
/// Each vector in the bits of a type, to nearest even.
PRUNEOPD_INLINE Bits round_to(const float*, Vec v) { return Bits(v); }
PRUNEOPD_INLINE HalfBits round_to(const BFloat16*, Vec v) { return narrow(round_to_bfloat16(v) >> 16); }
/// Adds the lanes to as many sums.
PRUNEOPD_INLINE void accumulate(Vec a, double* sums) {
  for (int i = 0; i < kLanes; i += kLanes / 2) {
    const auto half = load_bits<HalfVec>(reinterpret_cast<const float*>(&a) + i);
    const Doubles sum = load_bits<Doubles>(sums + i) + to_double(half);
    __builtin_memcpy(sums + i, &sum, sizeof sum);
  }
}
/// Whether every lane is finite.
PRUNEOPD_INLINE bool all_finite(Vec a) { return at_least(a - a, a - a) == kAllLanes; }
/// One bit a lane: a is -inf and b is not.
PRUNEOPD_INLINE uint32_t only_first_negative_infinity(Vec a, Vec b) {
  const Vec bottom = broadcast(kNegativeInfinity);
  return at_least(bottom, a) & ~at_least(bottom, b);
}

/// With kStream, p is the address of a whole vector.
template <bool kStream, class Vector>
PRUNEOPD_INLINE void put(void* p, Vector v) {
  if constexpr (kStream)
    stream(p, v);
  else
    __builtin_memcpy(p, &v, sizeof v);
}
template <bool kStream, class T>
PRUNEOPD_INLINE void store_two(T* p, const Vec (&v)[2]) {
  for (int i = 0; i < 2; ++i) put<kStream>(p + i * kLanes, round_to(p, v[i]));
}
/// What load_even_odd has loaded.
template <bool kStream>
PRUNEOPD_INLINE void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  put<kStream>(p, round_to_bfloat16(even) >> 16 | (round_to_bfloat16(odd) & 0xffff0000u));
}

/// 2**(d * scale), NaN where d is; relative error 1e-7, exact at d = 0. Results below 2**-126 are 0, or with kClamped,
/// where d * scale >= -126 is known, do not occur. Two vectors at a time, stage by stage, so that their chains of
/// operations overlap.
template <bool kClamped>
PRUNEOPD_INLINE void exp2_scaled(const Vec (&d)[2], const Vec (&scale)[2], Vec (&e)[2]) {
  const Vec magic = broadcast(kMagic);
  Vec n[2], r[2], p[2] = {broadcast(kPolynomial[0]), broadcast(kPolynomial[0])};
  for (int i = 0; i < 2; ++i) n[i] = fma(d[i], scale[i], magic);
  for (int i = 0; i < 2; ++i) r[i] = fma(d[i], scale[i], magic - n[i]);
  for (size_t term = 1; term < sizeof kPolynomial / sizeof *kPolynomial; ++term)
    for (int i = 0; i < 2; ++i) p[i] = fma(p[i], r[i], broadcast(kPolynomial[term]));
  for (int i = 0; i < 2; ++i) {
    const Vec power = Vec(find_power(Bits(n[i])));
    e[i] = PRUNEOPD_LEVEL > 0 ? fma(power * r[i], p[i], power) : fma(p[i], r[i], broadcast(1)) * power;
    if constexpr (!kClamped) e[i] = n[i] < broadcast(kMagic - 126) ? Vec{} : e[i];  // NaN passes
  }
}

}  // namespace pruneopd::PRUNEOPD_ISA
