// How a backward pass writes the gradient of a row: it streams over the logits once, 16 bytes at a time where the
// gradient is aligned, by one block, or by several that each take a share of the row. An id's gradient depends on its
// logits and on the row's state alone, so that neither the shares nor the alignment change a bit.
#pragma once

#include "position.cuh"

namespace pruneopd::cuda {

/// Whether float32 may multiply by a factor, or subtract a reference or an offset: beyond, the result may not be
/// finite, or 0 although it counts.
__device__ __forceinline__ bool is_tame(double value) { return fabs(value) < 1e30; }

/// Where the gradient of one row goes, in its type: the student's. It is written kIds at a time.
template <class T, int kIds>
struct Gradient {
  static constexpr int kBytes = kIds * sizeof(T);

  T* values;

  __device__ int ids_before_alignment() const {
    return static_cast<int>((-reinterpret_cast<uintptr_t>(values) & (kBytes - 1)) / sizeof(T));
  }
  __device__ void set(int64_t id, double value) const { values[id] = round_to<T>(static_cast<float>(value)); }
  __device__ void store(int id, const float (&g)[kIds]) const {
    auto* const at = reinterpret_cast<uint4*>(values + id);
    if constexpr (kBytes == 8)  // beside a teacher's row of another type
      *reinterpret_cast<uint2*>(at) = {pack<T>(g[0], g[1]), pack<T>(g[2], g[3])};
    else if constexpr (sizeof(T) == 2)
      store_once(at, {pack<T>(g[0], g[1]), pack<T>(g[2], g[3]), pack<T>(g[4], g[5]), pack<T>(g[6], g[7])});
    else
      store_once(at, {float_bits(g[0]), float_bits(g[1]), float_bits(g[2]), float_bits(g[3])});
  }
};

/// A block's share of a row: vectors of 16 bytes, and of the first block also what lies before them and after them. Ids
/// are counted from the first vector on.
template <class T, class G, int kSides>
struct GradientShare {
  using V = Vectors<T>;
  static constexpr int kIds = V::kIds;

  typename V::Row rows[kSides];
  Gradient<G, kIds> gradient;
  int64_t row_width;
  int first_id;    // of the vectors, in the row
  int tail;        // where the vectors of all blocks end
  int begin, end;  // this block's vectors, by their number
  bool has_edges;

  __device__ GradientShare(const Rows<kSides>& args, void* gradients, int64_t row_width, int n)
      : gradient{static_cast<G*>(gradients) + n * row_width}, row_width(row_width) {
    // A misaligned row is read in aligned words, which must lie in the row: a vector more on either side.
    int head = gradient.ids_before_alignment(), margin = 0;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      rows[side] = make_row<T>(args.logits[side].row(n), args.logits[side].type, args.vocab_size);
      if (rows[side].from(head).misalignment()) margin = kIds;
    }
    head += margin;
    const int vectors = max(args.vocab_size - head - margin, 0) / kIds;
    if (vectors == 0) head = 0;
    first_id = head;
    tail = vectors * kIds;
#pragma unroll
    for (int side = 0; side < kSides; ++side) rows[side] = rows[side].from(head);
    gradient.values += head;
    const int slice = args.slice();
    begin = static_cast<int>(int64_t{vectors} * slice / args.slices);
    end = static_cast<int>(int64_t{vectors} * (slice + 1) / args.slices);
    has_edges = slice == 0;
  }

  __device__ bool owns(int id) const {
    return id < 0 || id >= tail ? has_edges : id / kIds >= begin && id / kIds < end;
  }

  /// visit(id) of what lies before the vectors and after them.
  template <class Visit>
  __device__ void for_edges(const Visit& visit) const {
    if (!has_edges) return;
    const int64_t end_of_row = row_width - first_id;
#pragma unroll 1
    for (int64_t i = thread_in_block() - first_id; i < end_of_row - tail; i += kThreads) visit(i < 0 ? i : i + tail);
  }

  /// The same value for every id that exists.
  __device__ void fill(float value) const {
    float g[kIds];
#pragma unroll
    for (int i = 0; i < kIds; ++i) g[i] = value;
#pragma unroll 4
    for (int v = begin + thread_in_block(); v < end; v += kThreads) gradient.store(v * kIds, g);
    for_edges([&](int64_t id) { gradient.set(id, id < rows[0].vocab_size ? value : 0); });
  }

  /// of_logits(x) of one id, where no vector may be taken.
  template <class OfLogits>
  __device__ void set_one(int64_t id, const OfLogits& of_logits) const {
    if (id >= rows[0].vocab_size) return gradient.set(id, 0);
    float x[kSides];
#pragma unroll
    for (int side = 0; side < kSides; ++side) x[side] = rows[side].logit(static_cast<int>(id));
    gradient.set(id, of_logits(x));
  }

  /// Every id by itself.
  template <class OfLogits>
  __device__ void write_singly(const OfLogits& of_logits) const {
#pragma unroll 1
    for (int id = begin * kIds + thread_in_block(); id < end * kIds; id += kThreads) set_one(id, of_logits);
    for_edges([&](int64_t id) { set_one(id, of_logits); });
  }

  /// of_vectors(x, g) sets the gradients of a vector and returns whether some are to be set again, by
  /// of_vectors.one(x).
  template <class OfVectors>
  __device__ __forceinline__ void stream(const OfVectors& of_vectors) const {
    constexpr int kCount = 4 / kSides, kStep = kThreads * kCount;
    const auto one = [&](const float(&x)[kSides]) { return of_vectors.one(x); };
    const auto write = [&](const float(&x)[kSides][kIds], int id) {
      float g[kIds];
      const bool again = of_vectors(x, g);
      gradient.store(id, g);
      if (!again) return;
#pragma unroll 1
      for (int i = 0; i < kIds; ++i) set_one(id + i, one);
    };
    int v = begin + thread_in_block();
    for (int step = begin; step + kStep <= end; step += kStep, v += kStep) {
      uint4 vectors[kSides][kCount];
#pragma unroll
      for (int side = 0; side < kSides; ++side)
        rows[side].load_inside([&](int j) { return (v + j * kThreads) * kIds; }, vectors[side]);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        float x[kSides][kIds];
#pragma unroll
        for (int side = 0; side < kSides; ++side) V::logits(vectors[side][j], x[side]);
        write(x, (v + j * kThreads) * kIds);
      }
    }
#pragma unroll 1
    for (; v < end; v += kThreads) {
      float x[kSides][kIds];
      uint4 vector[1];
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        rows[side].load_inside([&](int) { return v * kIds; }, vector);
        V::logits(vector[0], x[side]);
      }
      write(x, v * kIds);
    }
    for_edges([&](int64_t id) { set_one(id, one); });
  }
};

// ---- The host's part.

/// Launches a backward pass whose parameters hold `rows`. Several blocks take a row where there are few.
template <class T, class Params>
void launch_over_gradient(void (*kernel)(Params), int64_t positions, int64_t width, int64_t shared_bytes, Params params,
                          const Queue& queue) {
  if (positions == 0) return;
  const int64_t wanted = 16 * device_attribute(cudaDevAttrMultiProcessorCount, queue);
  const int64_t most = (width + kThreads * Vectors<T>::kIds - 1) / (kThreads * Vectors<T>::kIds);
  params.rows.slices = static_cast<int>(std::min(most, (wanted + positions - 1) / positions));
  launch(kernel, positions * params.rows.slices, kThreads, shared_bytes, queue, params);
}

}  // namespace pruneopd::cuda
