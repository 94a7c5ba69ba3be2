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

/// Words from kFirst on of two neighbours, moved down by `shift` bits: 0 or 16.
template <int kFirst, class Word>
__device__ __forceinline__ Word join(const Word& low, const Word& high, unsigned shift) {
  constexpr int kCount = sizeof(Word) / sizeof(uint32_t);
  uint32_t words[2 * kCount], joined[kCount];
  __builtin_memcpy(words, &low, sizeof low);
  __builtin_memcpy(words + kCount, &high, sizeof high);
#pragma unroll
  for (int i = 0; i < kCount; ++i) joined[i] = __funnelshift_r(words[kFirst + i], words[kFirst + i + 1], shift);
  Word word;
  __builtin_memcpy(&word, joined, sizeof word);
  return word;
}

/// The logits of one row, in one type, read in vectors of a Word: uint4 or uint2.
template <class T, class Word = uint4>
struct TypedRow {
  static constexpr int kIds = sizeof(Word) / sizeof(T);  // in a vector

  const T* logits;
  int vocab_size;

  /// The row without its first ids.
  __device__ TypedRow from(int id) const { return {logits + id, vocab_size - id}; }
  __device__ unsigned misalignment() const { return reinterpret_cast<uintptr_t>(logits) & (sizeof(Word) - 1); }
  /// Whether a vector from any id in [first, last] on lies in the row, with the aligned words that hold it.
  __device__ bool has_around(int first, int last) const {
    const int margin = misalignment() ? kIds : 0;
    return first >= margin && last + kIds + margin <= vocab_size;
  }
  /// The first of the aligned words that hold the vector from an id on.
  __device__ const Word* word(int id) const {
    return reinterpret_cast<const Word*>(reinterpret_cast<uintptr_t>(logits + id) & ~uintptr_t{sizeof(Word) - 1});
  }
  /// Shifts misaligned vectors into place; each comes as the aligned words that hold it.
  template <int kCount>
  __device__ __forceinline__ void join_all(Word (&low)[kCount], const Word (&high)[kCount]) const {
    const unsigned first = misalignment() / 4, shift = (misalignment() & 2) * 8;
    const auto join_from = [&]<int kFirst>() {
#pragma unroll
      for (int j = 0; j < kCount; ++j) low[j] = join<kFirst>(low[j], high[j], shift);
    };
    if (first == 0) return join_from.template operator()<0>();
    if constexpr (sizeof(Word) == 16) {
      if (first == 2) return join_from.template operator()<2>();
      if (first == 3) return join_from.template operator()<3>();
    }
    join_from.template operator()<1>();
  }
  /// Vectors from the ids id_of(0), id_of(1), ... on, where the row has_around.
  template <int kCount, class IdOf>
  __device__ __forceinline__ void load_inside(const IdOf& id_of, Word (&vectors)[kCount]) const {
    if (!misalignment()) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) vectors[j] = load_once(reinterpret_cast<const Word*>(logits + id_of(j)));
    } else {
      Word high[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        vectors[j] = word(id_of(j))[0];
        high[j] = word(id_of(j))[1];
      }
      join_all(vectors, high);
    }
  }
  /// The same anywhere, the ids ascending: beyond the end there is -inf.
  template <int kCount, class IdOf>
  __device__ __forceinline__ void load(const IdOf& id_of, Word (&vectors)[kCount]) const {
    if (id_of(0) >= vocab_size) {
#pragma unroll
      for (Word& vector : vectors) vector = nothing();
      return;
    }
    bool has_edge = false;
    const auto start = [&](int j, const auto& load_word) {
      const int id = id_of(j);
      const bool inside = has_around(id, id);
      vectors[j] = nothing();
      if (inside) load_word(word(id));
      has_edge |= !inside && id < vocab_size;
    };
    if (!misalignment()) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) start(j, [&](const Word* at) { vectors[j] = at[0]; });
    } else {
      Word high[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        high[j] = nothing();
        start(j, [&](const Word* at) {
          vectors[j] = at[0];
          high[j] = at[1];
        });
      }
      join_all(vectors, high);
    }
    if (!has_edge) return;
#pragma unroll 1
    for (int j = 0; j < kCount; ++j) {
      const int id = id_of(j);
      if (!has_around(id, id) && id < vocab_size) put(vectors, j, load_edge(id));
    }
  }
  /// A vector beyond the end.
  __device__ static Word nothing() {
    uint32_t words[sizeof(Word) / 4];
#pragma unroll
    for (uint32_t& word : words) word = kNegativeInfinity<T> * (sizeof(T) == 2 ? 0x10001u : 1);
    Word word;
    __builtin_memcpy(&word, words, sizeof word);
    return word;
  }
  /// One by one.
  __device__ Word load_edge(int id) const {
    uint32_t words[sizeof(Word) / 4] = {};
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      uint32_t bits = kNegativeInfinity<T>;
      if (id + i < vocab_size) {
        if constexpr (sizeof(T) == 2)
          bits = reinterpret_cast<const uint16_t*>(logits)[id + i];
        else
          bits = reinterpret_cast<const uint32_t*>(logits)[id + i];
      }
      words[i * sizeof(T) / 4] |= bits << (i * sizeof(T) % 4 * 8);
    }
    Word word;
    __builtin_memcpy(&word, words, sizeof word);
    return word;
  }
  __device__ float logit(int id) const { return to_float(logits[id]); }
};

/// One word of several vectors.
template <int kCount>
__device__ __forceinline__ uint32_t word_of(const uint4 (&vectors)[kCount], int word) {
  const uint4 vector = pick(vectors, word / 4);
  return pick({vector.x, vector.y, vector.z, vector.w}, word % 4);
}

/// An order without the bits that are the same in every order of T, and the whole of it again.
template <class V>
__device__ __forceinline__ uint32_t short_order(float x) {
  return order_of(x) >> V::kOrderShift;
}
template <class V>
__device__ __forceinline__ uint32_t whole_order(uint32_t order) {
  const bool is_negative = !(order >> (31 - V::kOrderShift));
  return order << V::kOrderShift | (is_negative ? (1u << V::kOrderShift) - 1 : 0);
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

  /// The greatest logit, or the least one.
  template <bool kLeast, int kVectors>
  __device__ static float extreme(const uint4 (&vectors)[kVectors]) {
    uint32_t word = vectors[0].x;
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
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

  template <bool kLeast, int kVectors>
  __device__ static float extreme(const uint4 (&vectors)[kVectors]) {
    float found = bits_float(vectors[0].x);
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
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

/// A row of a type that is known only when the kernel runs. It is read as float32: vectors of 4 ids in any type.
struct AnyRow {
  const void* data;
  Scalar type;
  int vocab_size;

  /// visit(row) with the row in its type.
  template <class Visit>
  __device__ __forceinline__ auto in_type(const Visit& visit) const {
    if (type == Scalar::kF32) return visit(TypedRow<float>{static_cast<const float*>(data), vocab_size});
    if (type == Scalar::kBF16) return visit(TypedRow<BFloat16, uint2>{static_cast<const BFloat16*>(data), vocab_size});
    return visit(TypedRow<Half, uint2>{static_cast<const Half*>(data), vocab_size});
  }
  __device__ AnyRow from(int id) const {
    return {static_cast<const char*>(data) + id * bytes_of(type), type, vocab_size - id};
  }
  __device__ unsigned misalignment() const {
    return in_type([](const auto& row) { return row.misalignment(); });
  }
  __device__ bool has_around(int first, int last) const {
    return in_type([&](const auto& row) { return row.has_around(first, last); });
  }
  template <int kCount, class IdOf>
  __device__ __forceinline__ void load_inside(const IdOf& id_of, uint4 (&vectors)[kCount]) const {
    in_type([&](const auto& row) { load_wide(vectors, [&](auto& own) { row.load_inside(id_of, own); }, row); });
  }
  template <int kCount, class IdOf>
  __device__ __forceinline__ void load(const IdOf& id_of, uint4 (&vectors)[kCount]) const {
    in_type([&](const auto& row) { load_wide(vectors, [&](auto& own) { row.load(id_of, own); }, row); });
  }
  __device__ float logit(int id) const { return static_cast<float>(load_real(data, type, id)); }

 private:
  template <int kCount, class Load>
  __device__ static void load_wide(uint4 (&vectors)[kCount], const Load& load, const TypedRow<float>&) {
    load(vectors);
  }
  template <int kCount, class Load, class T>
  __device__ static void load_wide(uint4 (&vectors)[kCount], const Load& load, const TypedRow<T, uint2>&) {
    uint2 halves[kCount];
    load(halves);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float x[4];
      unpack<T>(halves[j].x, x[0], x[1]);
      unpack<T>(halves[j].y, x[2], x[3]);
      vectors[j] = {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
    }
  }
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
