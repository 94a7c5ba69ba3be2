// The k best of each row, narrowed down from tiles to vectors of 16 bytes to ids. However a row is cut into ranges of
// ids, the first k ranges by (maximum descending, range ascending) hold the k best: an element of any later range comes
// after the k maxima of those. So each step has a fixed size for any row, and nothing can overflow.
//
// Of two rows half of the block works on each, and both halves meet at the same barriers.
#pragma once

#include "row_pass.cuh"

namespace pruneopd::cuda {

/// Maxima that one step of the selection compares.
constexpr int kMostParts = 8 * kMaxCandidates;

/// The selection's part of the shared memory.
template <int kSides>
struct Selection {
  static constexpr int kRowThreads = kThreads / kSides;

  Candidate best[kSides][kMaxCandidates];     // the result: the first k, in order
  Candidate found[kSides][kMaxCandidates];    // the same and perhaps more, in no order
  uint32_t orders[kSides][kMostParts];        // of the maxima that a step compares
  uint32_t parts[kSides][2][kMaxCandidates];  // numbers of chosen parts, ascending: of this step and of the one before
  int count[kSides];                          // of the chosen parts
};

/// Chooses parts of a row that hold the k best, from the orders of their maxima: the first k by (order descending, part
/// ascending), or all that reach some order if these are no more than `most`. Calls take(slot, part) for each, parts
/// ascending, and returns their number. By one warp.
template <class T, class Take>
__device__ __forceinline__ int choose(const uint32_t* orders, int count, int k, int most, int lane, const Take& take) {
  constexpr int kShift = Vectors<T>::kOrderShift;  // bits that are the same in every order of T
  uint32_t low = 0xffffffffu, high = 0;
  for (int part = lane; part < count; part += kWarpSize) {
    low = min(low, orders[part]);
    high = max(high, orders[part]);
  }
  low = __reduce_min_sync(kWholeWarp, low) >> kShift;
  high = __reduce_max_sync(kWholeWarp, high) >> kShift;
  // `reach` parts reach `low`, at least k if there are as many; `above` exceed `high`, fewer than k.
  int reach = count, above = 0;
  while (reach > most && low < high) {
    const uint32_t middle = high - (high - low) / 2;
    int reach_middle = 0;
    for (int part = lane; part < count; part += kWarpSize) reach_middle += orders[part] >> kShift >= middle;
    reach_middle = __reduce_add_sync(kWholeWarp, reach_middle);
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
    const uint32_t order = part < count ? orders[part] >> kShift : 0;
    const unsigned ties_here = __ballot_sync(kWholeWarp, order == low);
    const bool take_this = order > low || (order == low && count_before(ties_here, lane) < ties);
    const unsigned taken = __ballot_sync(kWholeWarp, take_this);
    if (take_this) take(taken_count + count_before(taken, lane), part);
    ties -= __popc(ties_here);
    taken_count += __popc(taken);
  }
  return taken_count;
}

/// Writes the orders of maxima in `count` parts of a row of `vectors` vectors each: of each `group` vectors. By the
/// row's share of the block.
template <class T, int kRowThreads>
__device__ __forceinline__ void find_maxima(const typename Vectors<T>::Row& row, const uint32_t* parts, int count,
                                            int vectors, int group, int thread, uint32_t* orders) {
  using V = Vectors<T>;
#pragma unroll 1
  for (int first = thread; first < count * vectors; first += V::kCount * kRowThreads) {
    V loaded;
#pragma unroll
    for (int j = 0; j < V::kCount; ++j) {
      const int i = first + j * kRowThreads, vector = i % vectors;
      if (i < count * vectors)
        loaded.vectors[j] = row.load((static_cast<int>(parts[i / vectors]) * vectors + vector) * V::kIds);
    }
#pragma unroll
    for (int j = 0; j < V::kCount; ++j) {
      const int i = first + j * kRowThreads;
      if (i >= count * vectors) break;  // whole warps, if they take groups
      float max = loaded.template extreme<false>(j, j + 1);
      if (group > 1) max = tile_max(max);
      if (i % group == 0) orders[i / group] = order_of(max);
    }
  }
}

/// The k best of each row, into `out.best`, from the tiles in out.parts[side][0]; a barrier lies between. The caller
/// needs a barrier before it reads the result.
template <class T, int kSides>
__device__ __forceinline__ void select(const typename Vectors<T>::Row& row, int k, Selection<kSides>& out) {
  using V = Vectors<T>;
  constexpr int kRowThreads = Selection<kSides>::kRowThreads;
  const int side = thread_in_block() / kRowThreads, thread = thread_in_block() % kRowThreads;
  const int lane = thread % kWarpSize, most = min(2 * k, static_cast<int>(kMaxCandidates));
  uint32_t* const orders = out.orders[side];
  int step = 0;
#pragma unroll 1
  for (int vectors = Cut<T>::kTile / V::kIds; vectors > 1; step ^= 1) {  // of a part
    const uint32_t *const parts = out.parts[side][step];
    const int count = out.count[side], group = count * vectors <= kMostParts ? 1 : kTileThreads;
    find_maxima<T, kRowThreads>(row, parts, count, vectors, group, thread, orders);
    __syncthreads();
    if (thread < kWarpSize) {
      const int groups = vectors / group;
      const int chosen = choose<T>(orders, count * groups, k, most, lane, [&](int slot, int i) {
        out.parts[side][1 - step][slot] = parts[i / groups] * groups + i % groups;
      });
      if (lane == 0) out.count[side] = chosen;
    }
    __syncthreads();
    vectors = group;
  }
  const uint32_t* const vectors = out.parts[side][step];
  const int ids = out.count[side] * V::kIds;
  const auto id_of = [&](int i) { return vectors[i / V::kIds] * V::kIds + i % V::kIds; };
#pragma unroll 4
  for (int i = thread; i < ids; i += kRowThreads) {
    const int id = static_cast<int>(id_of(i));
    orders[i] = order_of(id < row.vocab_size ? row.logit(id) : -INFINITY);
  }
  __syncthreads();
  if (thread < kWarpSize) {
    const int chosen = choose<T>(orders, ids, k, most, lane, [&](int slot, int i) {
      out.found[side][slot] = static_cast<Candidate>(orders[i]) << 32 | ~id_of(i);
    });
    if (lane == 0) out.count[side] = chosen;
  }
  __syncthreads();
  const int count = out.count[side];
  for (int i = thread; i < count; i += kRowThreads) {
    const Candidate mine = out.found[side][i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += out.found[side][j] > mine;
    if (rank < k) out.best[side][rank] = mine;
  }
}

}  // namespace pruneopd::cuda
