// What one thread holds of a row, and how it gets there: 16 bytes at a time, whatever the row's alignment. Ids fit in
// an int: a vocabulary is limited by the shared memory that its tile maxima need.
#pragma once

#include "ptx.cuh"
#include "warp.cuh"

namespace pruneopd::cuda {

/// Logits of a type that is known only when the kernel runs; for pairs of different types.
struct AnyLogit {};

/// The bits of -inf.
template <class T>
constexpr uint32_t kNegativeInfinity = sizeof(T) == 4                ? 0xff800000u
                                       : std::is_same_v<T, BFloat16> ? 0xff80u
                                                                     : 0xfc00u;

/// Bytes [offset, offset + 16) of two neighbours. `offset` is the same for the whole block.
__device__ __forceinline__ uint4 join(uint4 low, uint4 high, unsigned offset) {
  uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = offset & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = offset & 4 ? words[i + 1] : words[i];
  const unsigned shift = (offset & 2) * 8;
  return {__funnelshift_r(words[0], words[1], shift), __funnelshift_r(words[1], words[2], shift),
          __funnelshift_r(words[2], words[3], shift), __funnelshift_r(words[3], words[4], shift)};
}

/// The logits of one row, in one type.
template <class T>
struct TypedRow {
  static constexpr int kIds = 16 / sizeof(T);  // in 16 bytes

  const T* logits;
  int vocab_size;

  /// The row without its first ids.
  __device__ TypedRow from(int id) const { return {logits + id, vocab_size - id}; }
  __device__ unsigned misalignment() const { return reinterpret_cast<uintptr_t>(logits) & 15; }
  /// Whether 16 bytes from any id in [first, last] on lie in the row, with the aligned words that hold them.
  __device__ bool has_around(int first, int last) const {
    return misalignment() ? first >= kIds && last + 2 * kIds <= vocab_size : last + kIds <= vocab_size;
  }
  __device__ uint4 load_aligned(int id) const { return load_once(reinterpret_cast<const uint4*>(logits + id)); }
  __device__ uint4 load_misaligned(int id) const {
    const auto* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(logits + id) & ~uintptr_t{15});
    return join(aligned[0], aligned[1], misalignment());
  }
  /// One by one; beyond the end there is -inf.
  __device__ uint4 load_edge(int id) const {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      uint32_t bits = kNegativeInfinity<T>;
      if (id + i < vocab_size) {
        if constexpr (sizeof(T) == 2)
          bits = reinterpret_cast<const uint16_t*>(logits)[id + i];
        else
          bits = reinterpret_cast<const uint32_t*>(logits)[id + i];
      }
      words[i / (kIds / 4)] |= bits << (i % (kIds / 4) * 16);
    }
    return {words[0], words[1], words[2], words[3]};
  }
  __device__ uint4 load_inside(int id) const { return misalignment() ? load_misaligned(id) : load_aligned(id); }
  __device__ uint4 load(int id) const { return has_around(id, id) ? load_inside(id) : load_edge(id); }
  __device__ float logit(int id) const { return to_float(logits[id]); }
};

/// Vectors of 16 bytes: from `id`, `id + stride`, ... on, where the row has_around.
template <class Row, int kCount>
__device__ __forceinline__ void load_vectors_inside(const Row& row, int id, int stride, uint4 (&vectors)[kCount]) {
  if (row.misalignment()) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) vectors[j] = row.load_misaligned(id + j * stride);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) vectors[j] = row.load_aligned(id + j * stride);
  }
}

/// The same anywhere. `first` to `last` are the ids of the whole block.
template <class Row, int kCount>
__device__ __forceinline__ void load_vectors(const Row& row, int id, int stride, int first, int last,
                                             uint4 (&vectors)[kCount]) {
  if (!row.has_around(first, last)) {
#pragma unroll 1
    for (int j = 0; j < kCount; ++j) put(vectors, j, row.load(id + j * stride));
  } else {
    load_vectors_inside(row, id, stride, vectors);
  }
}

/// One word of several vectors.
template <int kCount>
__device__ __forceinline__ uint32_t word_of(const uint4 (&vectors)[kCount], int word) {
  const uint4 vector = pick(vectors, word / 4);
  return pick({vector.x, vector.y, vector.z, vector.w}, word % 4);
}

/// What a thread holds of a row in one step: kCount vectors of kIds neighbours.
template <class T>
struct Vectors;

template <class T>
  requires(sizeof(T) == 2)
struct Vectors<T> {
  static constexpr int kIds = 8, kCount = 4, kOrderShift = std::is_same_v<T, BFloat16> ? 16 : 13;
  using Row = TypedRow<T>;

  uint4 vectors[kCount];

  __device__ void load(const Row& row, int id, int stride, int first, int last) {
    load_vectors(row, id, stride, first, last, vectors);
  }
  /// The greatest logit, or the least one: of vectors [begin, end).
  template <bool kLeast>
  __device__ float extreme(int begin = 0, int end = kCount) const {
    uint32_t word = vectors[begin].x;
#pragma unroll
    for (int j = begin; j < end; ++j)
      for (const uint32_t other : {vectors[j].x, vectors[j].y, vectors[j].z, vectors[j].w})
        word = extreme_2<T, kLeast>(word, other);
    float low, high;
    unpack<T>(word, low, high);
    return cuda::extreme<kLeast>(low, high);
  }
  /// The two logits of pair p.
  __device__ void pair(int p, float (&x)[2]) const { unpack<T>(word_of(vectors, p), x[0], x[1]); }
  __device__ static void logits(const uint4& vector, float (&x)[kIds]) {
    unpack<T>(vector.x, x[0], x[1]);
    unpack<T>(vector.y, x[2], x[3]);
    unpack<T>(vector.z, x[4], x[5]);
    unpack<T>(vector.w, x[6], x[7]);
  }
};

template <>
struct Vectors<float> {
  static constexpr int kIds = 4, kCount = 4, kOrderShift = 0;
  using Row = TypedRow<float>;

  uint4 vectors[kCount];

  template <class AnyOfRows>
  __device__ void load(const AnyOfRows& row, int id, int stride, int first, int last) {
    load_vectors(row, id, stride, first, last, vectors);
  }
  template <bool kLeast>
  __device__ float extreme(int begin = 0, int end = kCount) const {
    float found = bits_float(vectors[begin].x);
#pragma unroll
    for (int j = begin; j < end; ++j)
      for (const uint32_t word : {vectors[j].x, vectors[j].y, vectors[j].z, vectors[j].w})
        found = cuda::extreme<kLeast>(found, bits_float(word));
    return found;
  }
  __device__ void pair(int p, float (&x)[2]) const {
    for (const int i : {0, 1}) x[i] = bits_float(word_of(vectors, 2 * p + i));
  }
  __device__ static void logits(const uint4& vector, float (&x)[kIds]) {
    x[0] = bits_float(vector.x);
    x[1] = bits_float(vector.y);
    x[2] = bits_float(vector.z);
    x[3] = bits_float(vector.w);
  }
};

/// A row of a type that is known only when the kernel runs. It is read as float32, and each load looks at its address.
struct AnyRow {
  const void* data;
  Scalar type;
  int vocab_size;

  template <class T>
  __device__ TypedRow<T> as() const {
    return {static_cast<const T*>(data), vocab_size};
  }
  __device__ AnyRow from(int id) const {
    return {static_cast<const char*>(data) + id * bytes_of(type), type, vocab_size - id};
  }
  __device__ unsigned misalignment() const { return 0; }
  __device__ bool has_around(int, int) const { return false; }
  __device__ uint4 load_aligned(int id) const { return load(id); }
  __device__ uint4 load_misaligned(int id) const { return load(id); }
  __device__ uint4 load_inside(int id) const { return load(id); }
  __device__ uint4 load(int id) const {
    if (type == Scalar::kF32) return as<float>().load(id);
    float x[8];
    const int first = id / 8 * 8;
    if (type == Scalar::kBF16)
      Vectors<BFloat16>::logits(as<BFloat16>().load(first), x);
    else
      Vectors<Half>::logits(as<Half>().load(first), x);
    const auto bits = [&](int i) { return float_bits(id == first ? x[i] : x[i + 4]); };
    return {bits(0), bits(1), bits(2), bits(3)};
  }
  __device__ float logit(int id) const { return static_cast<float>(load_real(data, type, id)); }
};

template <>
struct Vectors<AnyLogit> : Vectors<float> {
  using Row = AnyRow;
};

template <class T>
__device__ typename Vectors<T>::Row make_row(const void* logits, Scalar type, int vocab_size) {
  if constexpr (std::is_same_v<T, AnyLogit>)
    return {logits, type, vocab_size};
  else
    return {static_cast<const T*>(logits), vocab_size};
}

}  // namespace pruneopd::cuda
