// The k best of each row, narrowed down from tiles to vectors of 16 bytes to ids. However a row is cut into ranges of
// ids, the first k ranges by (maximum descending, range ascending) hold the k best: an element of any later range comes
// after the k maxima of those. So each step has a fixed size for any row, and nothing can overflow.
//
// Of two rows half of the block works on each, and both halves meet at the same barriers.
#pragma once

#include "row_pass.cuh"

namespace pruneopd::cuda {

/// Vectors that a thread of the selection loads at a time.
constexpr int kAtATime = 4;
/// Maxima that one step of the selection compares.
constexpr int kMostParts = 8 * kMaxCandidates;

/// The selection's part of the shared memory.
template <int kSides>
struct alignas(16) Selection {
  static constexpr int kRowThreads = kThreads / kSides;

  uint32_t orders[kSides][kMostParts];        // of the maxima that a step compares: short ones
  Candidate best[kSides][kMaxCandidates];     // the result: the first k, in order
  Candidate found[kSides][kMaxCandidates];    // the same and perhaps more, by ascending id
  uint32_t parts[kSides][2][kMaxCandidates];  // numbers of chosen parts, ascending: of this step and of the one before
  int count[kSides];                          // of the chosen parts
  uint32_t low[kSides];                       // an order that k of them reach
};

/// Chooses parts of a row that hold the k best, from the short orders of their maxima, k of which reach `low`: the
/// first k by (order descending, part ascending), or all that reach some order if these are no more than `most`. Calls
/// take(slot, part) for each, parts ascending. Returns their number and raises `low`. By one warp.
template <class Take>
__device__ __forceinline__ int choose(const uint32_t* orders, int count, int k, int most, int lane, uint32_t& low,
                                      const Take& take) {
  const auto sum_over_orders = [&](const auto& of) {
    int sum = 0;
    for (int i = lane; i < count / 4; i += kWarpSize) {
      const uint4 four = reinterpret_cast<const uint4*>(orders)[i];
      sum += of(four.x) + of(four.y) + of(four.z) + of(four.w);
    }
    return static_cast<int>(__reduce_add_sync(kWholeWarp, sum));
  };
  const auto reaching = [&](uint32_t bound) { return sum_over_orders([=](uint32_t order) { return order >= bound; }); };
  // `reach` parts reach `low`, at least k if there are as many; `above` exceed `high`, fewer than k.
  int reach = reaching(low), above = 0;
  uint32_t high = low;
  if (reach > most) {
    for (int part = lane; part < count; part += kWarpSize) high = max(high, orders[part]);
    high = __reduce_max_sync(kWholeWarp, high);
  }
  while (reach > most && low < high) {
    const uint32_t middle = high - (high - low) / 2;
    const int reach_middle = reaching(middle);
    if (reach_middle >= k) {
      low = middle;
      reach = reach_middle;
    } else {
      high = middle - 1;
      above = reach_middle;
    }
  }
  int ties = reach > most ? k - above : count, taken_count = 0;
  for (int first = 0; first < count; first += kWarpSize) {
    const int part = first + lane;
    const uint32_t order = part < count ? orders[part] : 0;
    const unsigned ties_here = __ballot_sync(kWholeWarp, order == low);
    const bool take_this = order > low || (order == low && count_before(ties_here, lane) < ties);
    const unsigned taken = __ballot_sync(kWholeWarp, take_this && part < count);
    if (taken >> lane & 1) take(taken_count + count_before(taken, lane), part);
    ties -= __popc(ties_here);
    taken_count += __popc(taken);
  }
  return taken_count;
}

/// Calls visit(i, vectors) with kAtATime vectors of chosen parts, 1 << shift in each: vectors i, i + 1, ... of one part
/// if they are neighbours, else i, i + kRowThreads, ..., of which the last ones may not be there. By the row's share of
/// the block.
template <class T, int kRowThreads, bool kNeighbours, class Visit>
__device__ __forceinline__ void for_vectors(const typename Vectors<T>::Row& row, const uint32_t* parts, int count,
                                            int shift, int thread, const Visit& visit) {
  constexpr int kIds = Vectors<T>::kIds;
  const int end = count << shift;
  const auto id_of_vector = [&](int i) {
    return ((static_cast<int>(parts[i >> shift]) << shift) + (i & ((1 << shift) - 1))) * kIds;
  };
#pragma unroll 1
  for (int first = kNeighbours ? kAtATime * thread : thread; first < end; first += kAtATime * kRowThreads) {
    uint4 vectors[kAtATime];
    int ids[kAtATime] = {id_of_vector(first)};
    bool inside = row.has_around(ids[0], kNeighbours ? ids[0] + (kAtATime - 1) * kIds : ids[0]);
#pragma unroll
    for (int j = 1; j < kAtATime; ++j) {
      const int i = first + j * kRowThreads;
      ids[j] = kNeighbours ? ids[0] + j * kIds : i < end ? id_of_vector(i) : ids[0];
      if (!kNeighbours) inside &= row.has_around(ids[j], ids[j]);
    }
    if (inside)
      row.load_inside([&](int j) { return ids[j]; }, vectors);
    else
      row.load([&](int j) { return pick(ids, j); }, vectors);
    visit(first, vectors);
  }
}

/// Puts the first k of those found in order: a few by counting for each how many precede it, more by a bitonic sort.
template <int kSides>
__device__ __forceinline__ void sort_found(int k, int most, int side, int thread, Selection<kSides>& out) {
  constexpr int kRowThreads = Selection<kSides>::kRowThreads, kFew = 64;
  Candidate* const found = out.found[side];
  const int count = out.count[side];
  if (most <= kFew) {
    for (int i = thread; i < count; i += kRowThreads) {
      int rank = 0;
      for (int j = 0; j < count; ++j) rank += found[j] > found[i];
      if (rank < k) out.best[side][rank] = found[i];
    }
    return;
  }
  int size = 2 * kFew;
  while (size < most) size *= 2;
  for (int i = count + thread; i < size; i += kRowThreads) found[i] = 0;
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2)
#pragma unroll 1
    for (int apart = run / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int i = thread; i < size / 2; i += kRowThreads) {
        const int a = 2 * i - (i & (apart - 1)), b = a + apart;
        const Candidate first = found[a], second = found[b];
        if ((first < second) == !(a & run)) {
          found[a] = second;
          found[b] = first;
        }
      }
    }
  __syncthreads();
  for (int i = thread; i < k; i += kRowThreads) out.best[side][i] = found[i];
}

/// The k best of each row, into `out.best`, from the tiles in out.parts[side][0]; a barrier lies between. The caller
/// needs a barrier before it reads the result.
template <class T, int kSides>
__device__ __forceinline__ void select(const typename Vectors<T>::Row& row, int k, Selection<kSides>& out) {
  using V = Vectors<T>;
  constexpr int kRowThreads = Selection<kSides>::kRowThreads, kIds = V::kIds;
  const int side = thread_in_block() / kRowThreads, thread = thread_in_block() % kRowThreads;
  // A few more than k save steps of the bisection; many more would be dear in what follows.
  const int lane = thread % kWarpSize, most = k <= 32 ? 2 * k : k;
  uint32_t* const orders = out.orders[side];
  // One warp chooses, and its first thread leaves what it has found behind the barrier.
  const auto choose_of = [&](int parts, const auto& take) {
    uint32_t low = out.low[side];
    __syncthreads();
    if (thread < kWarpSize) {
      const int chosen = choose(orders, parts, k, most, lane, low, take);
      if (lane == 0) {
        out.count[side] = chosen;
        out.low[side] = low;
      }
    }
    __syncthreads();
  };
  // From tiles to vectors, by way of 4 vectors at a time where there are many.
  static_assert(Cut<T>::kTile == kIds << 5 && kAtATime == 1 << 2);
  int step = 0;
#pragma unroll 1
  for (int shift = 5; shift > 0; step ^= 1) {
    const uint32_t* const parts = out.parts[side][step];
    const int count = out.count[side], to = count << shift <= kMostParts / 2 ? 0 : 2, by = shift - to,
              end = count << by;
    if (to > 0)
      for_vectors<T, kRowThreads, true>(row, parts, count, shift, thread, [&](int i, const uint4(&vectors)[kAtATime]) {
        orders[i / kAtATime] = short_order<V>(V::template extreme<false>(vectors));
      });
    else
      for_vectors<T, kRowThreads, false>(row, parts, count, shift, thread, [&](int i, const uint4(&vectors)[kAtATime]) {
#pragma unroll
        for (int j = 0; j < kAtATime; ++j, i += kRowThreads) {
          const uint4 vector[1] = {vectors[j]};
          if (i < end) orders[i] = short_order<V>(V::template extreme<false>(vector));
        }
      });
    choose_of(end, [&](int slot, int i) {
      out.parts[side][1 - step][slot] = (parts[i >> by] << by) + (i & ((1 << by) - 1));
    });
    shift = to;
  }
  const uint32_t* const vectors = out.parts[side][step];
  const int count = out.count[side];
  for_vectors<T, kRowThreads, false>(row, vectors, count, 0, thread, [&](int i, const uint4(&vectors)[kAtATime]) {
#pragma unroll
    for (int j = 0; j < kAtATime; ++j, i += kRowThreads) {
      float x[kIds];
      V::logits(vectors[j], x);
      if (i < count)
#pragma unroll
        for (int e = 0; e < kIds; ++e) orders[i * kIds + e] = short_order<V>(x[e]);
    }
  });
  choose_of(count * kIds, [&](int slot, int i) {
    const uint32_t id = vectors[i / kIds] * kIds + i % kIds;
    out.found[side][slot] = static_cast<Candidate>(whole_order<V>(orders[i])) << 32 | ~id;
  });
  sort_found(k, most, side, thread, out);
}

}  // namespace pruneopd::cuda
