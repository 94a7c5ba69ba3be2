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

constexpr float kNegativeInfinity = -__builtin_inff();

PRUNEOPD_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

#if PRUNEOPD_LEVEL == 2
using Vec = __m512;
#elif PRUNEOPD_LEVEL == 1
using Vec = __m256;
#else
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
#endif
constexpr int kLanes = sizeof(Vec) / sizeof(float);

PRUNEOPD_INLINE Vec add(Vec a, Vec b) { return a + b; }
PRUNEOPD_INLINE Vec sub(Vec a, Vec b) { return a - b; }
PRUNEOPD_INLINE Vec mul(Vec a, Vec b) { return a * b; }

#if PRUNEOPD_LEVEL == 2

PRUNEOPD_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
PRUNEOPD_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
PRUNEOPD_INLINE Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
PRUNEOPD_INLINE Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
/// The even and the odd elements of 2 * kLanes: cheaper than two loads in order.
PRUNEOPD_INLINE void load_even_odd(const BFloat16* p, Vec& even, Vec& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
PRUNEOPD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
/// b where a is NaN.
PRUNEOPD_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
/// v, but +0 where test is 0 (a NaN is not).
PRUNEOPD_INLINE Vec where_nonzero(Vec test, Vec v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
}
/// v, but +0 where test is -inf.
PRUNEOPD_INLINE Vec where_above_negative_infinity(Vec test, Vec v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, broadcast(kNegativeInfinity), _CMP_NEQ_UQ), v);
}
/// One bit a lane: a >= b.
PRUNEOPD_INLINE uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
/// Whether every lane of a is below b.
PRUNEOPD_INLINE bool all_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) == 0; }
/// One bit a lane: a is -inf and b is not.
PRUNEOPD_INLINE uint32_t only_first_negative_infinity(Vec a, Vec b) {
  const Vec bottom = broadcast(kNegativeInfinity);
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a, bottom, _CMP_EQ_OQ), b, bottom, _CMP_NEQ_UQ);
}
/// Whether every lane is finite.
PRUNEOPD_INLINE bool all_finite(Vec a) {
  const Vec zero = _mm512_sub_ps(a, a);
  return _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) == 0;
}
PRUNEOPD_INLINE float max_lane(Vec a) { return _mm512_reduce_max_ps(a); }
PRUNEOPD_INLINE float sum_lanes(Vec a) { return _mm512_reduce_add_ps(a); }
PRUNEOPD_INLINE void accumulate(Vec a, double* sums) {
  const __m256 low = _mm512_castps512_ps256(a), high = _mm512_extractf32x8_ps(a, 1);
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(high)));
}
/// Stores 64 bytes; with kStream past the caches, to an address of whole vectors.
template <bool kStream>
PRUNEOPD_INLINE void put(void* p, __m512i v) {
  kStream ? _mm512_stream_si512(static_cast<__m512i*>(p), v) : _mm512_storeu_si512(p, v);
}
/// To bfloat16, to nearest even, in the upper half of each lane; for what is no NaN.
PRUNEOPD_INLINE __m512i round_to_bfloat16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
template <bool kStream>
PRUNEOPD_INLINE void store_two(float* p, const Vec (&v)[2]) {
  for (int i = 0; i < 2; ++i) put<kStream>(p + i * kLanes, _mm512_castps_si512(v[i]));
}
template <bool kStream>
PRUNEOPD_INLINE void store_two(BFloat16* p, const Vec (&v)[2]) {
  const __m512i low = round_to_bfloat16(v[0]), high = round_to_bfloat16(v[1]);
  const __m256i halves[2] = {_mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16)),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16))};
  put<kStream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
}
template <bool kStream>
PRUNEOPD_INLINE void store_two(Half* p, const Vec (&v)[2]) {
  const __m256i halves[2] = {_mm512_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                             _mm512_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  put<kStream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
}
/// What load_even_odd has loaded.
template <bool kStream>
PRUNEOPD_INLINE void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  put<kStream>(p, _mm512_or_si512(_mm512_srli_epi32(round_to_bfloat16(even), 16),
                                  _mm512_and_si512(round_to_bfloat16(odd), upper)));
}
/// Makes what was stored past the caches visible to other threads.
PRUNEOPD_INLINE void finish_stream() { _mm_sfence(); }
/// 2**(d * scale), NaN where d is; relative error 1e-7, exact at d = 0. Results below 2**-126 are 0, or with kClamped,
/// where d * scale >= -126 is known, do not occur. Two vectors at a time, stage by stage, so that their chains of
/// operations overlap. 2**(j/32) comes from a table in two registers, whose entries have j taken out of the exponent
/// field beforehand.
template <bool kClamped>
PRUNEOPD_INLINE void exp2_scaled(const Vec (&d)[2], const Vec (&scale)[2], Vec (&e)[2]) {
  const __m512i table0 = _mm512_setr_epi32(
      0x3f800000 - (0 << 18), 0x3f82cd87 - (1 << 18), 0x3f85aac3 - (2 << 18), 0x3f88980f - (3 << 18),
      0x3f8b95c2 - (4 << 18), 0x3f8ea43a - (5 << 18), 0x3f91c3d3 - (6 << 18), 0x3f94f4f0 - (7 << 18),
      0x3f9837f0 - (8 << 18), 0x3f9b8d3a - (9 << 18), 0x3f9ef532 - (10 << 18), 0x3fa27043 - (11 << 18),
      0x3fa5fed7 - (12 << 18), 0x3fa9a15b - (13 << 18), 0x3fad583f - (14 << 18), 0x3fb123f6 - (15 << 18));
  const __m512i table1 = _mm512_setr_epi32(
      0x3fb504f3 - (16 << 18), 0x3fb8fbaf - (17 << 18), 0x3fbd08a4 - (18 << 18), 0x3fc12c4d - (19 << 18),
      0x3fc5672a - (20 << 18), 0x3fc9b9be - (21 << 18), 0x3fce248c - (22 << 18), 0x3fd2a81e - (23 << 18),
      0x3fd744fd - (24 << 18), 0x3fdbfbb8 - (25 << 18), 0x3fe0ccdf - (26 << 18), 0x3fe5b907 - (27 << 18),
      0x3feac0c7 - (28 << 18), 0x3fefe4ba - (29 << 18), 0x3ff5257d - (30 << 18), 0x3ffa83b3 - (31 << 18));
  const Vec magic = broadcast(0x1.8p18f);  // its last bit is worth 1/32
  Vec n[2], r[2], p[2];
  for (int i = 0; i < 2; ++i) n[i] = fma(d[i], scale[i], magic);
  for (int i = 0; i < 2; ++i) r[i] = sub(n[i], magic);
  for (int i = 0; i < 2; ++i) r[i] = _mm512_fmsub_ps(d[i], scale[i], r[i]);
  // Minimax in relative error on [-1/64, 1/64] (5.3e-8), tied to 1 at 0.
  for (int i = 0; i < 2; ++i) p[i] = fma(broadcast(0.24022649228572845f), r[i], broadcast(0.6931573152542114f));
  for (int i = 0; i < 2; ++i) {
    const __m512i bits = _mm512_castps_si512(n[i]);
    const Vec power = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_permutex2var_epi32(table0, bits, table1), _mm512_slli_epi32(bits, 18)));
    r[i] = mul(power, r[i]);
    if constexpr (kClamped) {
      e[i] = fma(r[i], p[i], power);
    } else {
      const __mmask16 normal = _mm512_cmp_ps_mask(n[i], broadcast(0x1.8p18f - 126), _CMP_NLT_UQ);  // NaN passes
      e[i] = _mm512_maskz_fmadd_ps(normal, r[i], p[i], power);
    }
  }
}

#elif PRUNEOPD_LEVEL == 1

PRUNEOPD_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
PRUNEOPD_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PRUNEOPD_INLINE Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
PRUNEOPD_INLINE Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PRUNEOPD_INLINE void load_even_odd(const BFloat16* p, Vec& even, Vec& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
PRUNEOPD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PRUNEOPD_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PRUNEOPD_INLINE Vec where_nonzero(Vec test, Vec v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
PRUNEOPD_INLINE Vec where_above_negative_infinity(Vec test, Vec v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(test, broadcast(kNegativeInfinity), _CMP_NEQ_UQ));
}
PRUNEOPD_INLINE uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
PRUNEOPD_INLINE bool all_below(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) == 0; }
PRUNEOPD_INLINE uint32_t only_first_negative_infinity(Vec a, Vec b) {
  const Vec bottom = broadcast(kNegativeInfinity);
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(a, bottom, _CMP_EQ_OQ), _mm256_cmp_ps(b, bottom, _CMP_NEQ_UQ))));
}
PRUNEOPD_INLINE bool all_finite(Vec a) {
  const Vec zero = _mm256_sub_ps(a, a);
  return _mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q)) == 0;
}
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
PRUNEOPD_INLINE void accumulate(Vec a, double* sums) {
  const __m128 low = _mm256_castps256_ps128(a), high = _mm256_extractf128_ps(a, 1);
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(low)));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_cvtps_pd(high)));
}
template <bool kStream>
PRUNEOPD_INLINE void put(void* p, __m256i v) {
  kStream ? _mm256_stream_si256(static_cast<__m256i*>(p), v) : _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
PRUNEOPD_INLINE __m256i round_to_bfloat16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
template <bool kStream>
PRUNEOPD_INLINE void store_two(float* p, const Vec (&v)[2]) {
  for (int i = 0; i < 2; ++i) put<kStream>(p + i * kLanes, _mm256_castps_si256(v[i]));
}
template <bool kStream>
PRUNEOPD_INLINE void store_two(BFloat16* p, const Vec (&v)[2]) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(round_to_bfloat16(v[0]), 16),
                                             _mm256_srli_epi32(round_to_bfloat16(v[1]), 16));
  put<kStream>(p, _mm256_permute4x64_epi64(packed, 0xd8));
}
template <bool kStream>
PRUNEOPD_INLINE void store_two(Half* p, const Vec (&v)[2]) {
  put<kStream>(p, _mm256_set_m128i(_mm256_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                   _mm256_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}
template <bool kStream>
PRUNEOPD_INLINE void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  put<kStream>(p, _mm256_or_si256(_mm256_srli_epi32(round_to_bfloat16(even), 16),
                                  _mm256_and_si256(round_to_bfloat16(odd), upper)));
}
PRUNEOPD_INLINE void finish_stream() { _mm_sfence(); }
/// As above, by eighths.
template <bool kClamped>
PRUNEOPD_INLINE void exp2_scaled(const Vec (&d)[2], const Vec (&scale)[2], Vec (&e)[2]) {
  const __m256i table =
      _mm256_setr_epi32(0x3f800000 - (0 << 20), 0x3f8b95c2 - (1 << 20), 0x3f9837f0 - (2 << 20), 0x3fa5fed7 - (3 << 20),
                        0x3fb504f3 - (4 << 20), 0x3fc5672a - (5 << 20), 0x3fd744fd - (6 << 20), 0x3feac0c7 - (7 << 20));
  const Vec magic = broadcast(0x1.8p20f);  // its last bit is worth 1/8
  Vec n[2], r[2], p[2];
  for (int i = 0; i < 2; ++i) n[i] = fma(d[i], scale[i], magic);
  for (int i = 0; i < 2; ++i) r[i] = sub(n[i], magic);
  for (int i = 0; i < 2; ++i) r[i] = _mm256_fmsub_ps(d[i], scale[i], r[i]);
  // Minimax in relative error on [-1/16, 1/16] (2.5e-8), tied to 1 at 0.
  for (int i = 0; i < 2; ++i) p[i] = fma(broadcast(0.0554962232708931f), r[i], broadcast(0.2402576357126236f));
  for (int i = 0; i < 2; ++i) p[i] = fma(p[i], r[i], broadcast(0.6931472420692444f));
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(n[i]);
    const Vec power =
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, bits), _mm256_slli_epi32(bits, 20)));
    e[i] = fma(mul(power, r[i]), p[i], power);
    if constexpr (!kClamped)  // NaN passes
      e[i] = _mm256_and_ps(e[i], _mm256_cmp_ps(n[i], broadcast(0x1.8p20f - 126), _CMP_NLT_UQ));
  }
}

#else

PRUNEOPD_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
PRUNEOPD_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PRUNEOPD_INLINE Vec load(const BFloat16* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
PRUNEOPD_INLINE Vec load(const Half* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
PRUNEOPD_INLINE void load_even_odd(const BFloat16* p, Vec& even, Vec& odd) {
  IntVec both;  // on a big-endian machine the odd come first: the order does not matter, only that both rows share it
  __builtin_memcpy(&both, p, sizeof both);
  even = reinterpret_cast<Vec>(both << 16);
  odd = reinterpret_cast<Vec>(both & static_cast<int32_t>(0xffff0000u));
}
PRUNEOPD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PRUNEOPD_INLINE Vec masked(Vec v, IntVec mask) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & mask); }
PRUNEOPD_INLINE Vec max(Vec a, Vec b) {
  const IntVec greater = a > b;
  return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(a) & greater) | (reinterpret_cast<IntVec>(b) & ~greater));
}
PRUNEOPD_INLINE Vec where_nonzero(Vec test, Vec v) { return masked(v, test != broadcast(0)); }
PRUNEOPD_INLINE Vec where_above_negative_infinity(Vec test, Vec v) {
  return masked(v, test != broadcast(kNegativeInfinity));
}
PRUNEOPD_INLINE uint32_t bits_of(IntVec mask) {
  return static_cast<uint32_t>((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
}
PRUNEOPD_INLINE uint32_t at_least(Vec a, Vec b) { return bits_of(a >= b); }
PRUNEOPD_INLINE bool all_below(Vec a, Vec b) { return bits_of(a < b) == 15; }
PRUNEOPD_INLINE uint32_t only_first_negative_infinity(Vec a, Vec b) {
  const Vec bottom = broadcast(kNegativeInfinity);
  return bits_of((a == bottom) & (b != bottom));
}
PRUNEOPD_INLINE bool all_finite(Vec a) {
  const Vec zero = a - a;
  return bits_of(zero == zero) == 15;
}
PRUNEOPD_INLINE float max_lane(Vec a) {
  const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}
PRUNEOPD_INLINE float sum_lanes(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
PRUNEOPD_INLINE void accumulate(Vec a, double* sums) {
  for (int i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(a[i]);
}
template <bool kStream, class T>
PRUNEOPD_INLINE void store_two(T* p, const Vec (&v)[2]) {
  for (int i = 0; i < 2 * kLanes; ++i) p[i] = from_float<T>(v[i / kLanes][i % kLanes]);
}
template <bool kStream>
PRUNEOPD_INLINE void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  IntVec both;
  for (int i = 0; i < kLanes; ++i)
    both[i] = static_cast<int32_t>(from_float<BFloat16>(even[i]).bits |
                                   static_cast<uint32_t>(from_float<BFloat16>(odd[i]).bits) << 16);
  __builtin_memcpy(p, &both, sizeof both);
}
PRUNEOPD_INLINE void finish_stream() {}
/// As above, without a table.
template <bool kClamped>
PRUNEOPD_INLINE void exp2_scaled(const Vec (&d)[2], const Vec (&scale)[2], Vec (&e)[2]) {
  typedef uint32_t UintVec __attribute__((vector_size(16)));  // shifts and sums of any bits are defined
  const Vec magic = broadcast(0x1.8p23f);                     // its last bit is worth 1
  for (int i = 0; i < 2; ++i) {
    const Vec t = d[i] * scale[i], n = t + magic, r = t - (n - magic);
    // Minimax in relative error on [-1/2, 1/2] (8.1e-8), tied to 1 at 0.
    Vec p = fma(broadcast(0.0013274633092805743f), r, broadcast(0.009671961888670921f));
    p = fma(p, r, broadcast(0.055506784468889236f));
    p = fma(p, r, broadcast(0.24022234976291656f));
    p = fma(p, r, broadcast(0.6931470632553101f));
    p = fma(p, r, broadcast(1.0f));
    const UintVec power = (reinterpret_cast<UintVec>(n) << 23) + 0x3f800000u;
    e[i] = mul(p, reinterpret_cast<Vec>(power));
    if constexpr (!kClamped) e[i] = masked(e[i], ~(t < broadcast(-126.0f)));  // NaN passes
  }
}

#endif

}  // namespace pruneopd::PRUNEOPD_ISA
