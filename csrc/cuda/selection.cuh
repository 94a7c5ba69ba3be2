// The k best of each row, from its tile maxima. The first k tiles by (maximum descending, tile ascending) hold all
// of them: an element of any later tile comes after the k maxima of those. So nothing here can overflow, whatever the
// rows.
//
// Of two rows half of the block works on each, and both halves meet at the same barriers.
#pragma once

#include "row_pass.cuh"

namespace pruneopd::cuda {

/// Candidates that a row has room for.
constexpr int kCapacity = 2 * kMaxCandidates;

/// The selection's part of the shared memory.
template <int kSides>
struct Selection {
  static constexpr int kRowThreads = kThreads / kSides;

  Candidate best[kSides][kMaxCandidates];  // the result: the first k, in order
  Candidate found[kSides][kCapacity];      // more than k, in no order
  uint32_t tiles[kSides][kMaxCandidates];
  uint32_t bound[kSides], top[kSides];  // orders: one that the k best reach, the greatest
  int tile_count[kSides], found_count[kSides];
};

/// The tiles that hold the k best, by one warp. `orders` are those of the tile maxima.
template <class T>
__device__ __forceinline__ void choose_tiles(const uint32_t* orders, int count, int k, int lane, uint32_t* chosen,
                                             int& chosen_count, uint32_t& bound, uint32_t& top) {
  constexpr int kShift = Vectors<T>::kOrderShift;  // bits that are the same in every order of T
  uint32_t least = 0xffffffffu, greatest = 0;
  for (int tile = lane; tile < count; tile += kWarpSize) {
    least = min(least, orders[tile]);
    greatest = max(greatest, orders[tile]);
  }
  least = __reduce_min_sync(kWholeWarp, least);
  greatest = __reduce_max_sync(kWholeWarp, greatest);
  if (lane == 0) top = greatest;
  if (count <= k) {
    for (int tile = lane; tile < count; tile += kWarpSize) chosen[tile] = static_cast<uint32_t>(tile);
    if (lane == 0) {
      chosen_count = count;
      bound = 0;
    }
    return;
  }
  // At least k tiles reach `low`, fewer reach `high`: `above` of them.
  int64_t low = least >> kShift, high = static_cast<int64_t>(greatest >> kShift) + 1;
  int above = 0;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    int reach = 0;
    for (int tile = lane; tile < count; tile += kWarpSize) reach += orders[tile] >> kShift >= middle;
    reach = __reduce_add_sync(kWholeWarp, reach);
    if (reach >= k) low = middle;
    if (reach <= k) {
      high = middle;
      above = reach;
    }
  }
  int ties = k - above, written = 0;
  for (int first = 0; first < count; first += kWarpSize) {
    const int tile = first + lane;
    const int64_t order = tile < count ? static_cast<int64_t>(orders[tile] >> kShift) : -1;
    const unsigned ties_here = __ballot_sync(kWholeWarp, order == low && order < high);
    const bool take = order >= high || (order == low && order < high && count_before(ties_here, lane) < ties);
    const unsigned taken = __ballot_sync(kWholeWarp, take);
    if (take) chosen[written + count_before(taken, lane)] = static_cast<uint32_t>(tile);
    ties -= min(ties, __popc(ties_here));
    written += __popc(taken);
  }
  if (lane == 0) {
    chosen_count = k;
    bound = static_cast<uint32_t>(low) << kShift;
  }
}

/// A candidate in as few bits as it takes, so that they are soon bisected.
template <class T>
__device__ __forceinline__ uint64_t compact(Candidate candidate, int id_bits) {
  const uint64_t order = candidate >> (32 + Vectors<T>::kOrderShift), id = static_cast<uint32_t>(candidate);
  return order << id_bits | (id & ((uint64_t{1} << id_bits) - 1));
}

/// What passes: candidates that reach `least` (compact); `bound` is a logit that none of them is less than.
struct Filter {
  float bound;
  uint64_t least;
  int id_bits, vocab_size;
};

/// Counts what passes of one vector a thread, and keeps it as long as there is room. A whole warp comes together.
template <class T>
__device__ __forceinline__ void collect_vector(const uint4& vector, int id, const Filter& filter, int lane,
                                               Candidate* found, int& found_count) {
  constexpr int kIds = Vectors<T>::kIds;
  float x[kIds];
  Vectors<T>::logits(vector, x);
  unsigned near = 0;  // elements that may pass, a bit each
#pragma unroll
  for (int i = 0; i < kIds; ++i)
    if (!(x[i] < filter.bound)) near |= 1u << i;
  if (id + kIds > filter.vocab_size) near &= (1u << max(filter.vocab_size - id, 0)) - 1;
  // One element a thread at a time: of a vector there is seldom more than one.
  while (__any_sync(kWholeWarp, near != 0)) {
    const int i = near ? __ffs(static_cast<int>(near)) - 1 : 0;
    const Candidate candidate = make_candidate(pick(x, i), static_cast<uint32_t>(id + i));
    const bool passes = near && compact<T>(candidate, filter.id_bits) >= filter.least;
    near &= near - 1;
    const unsigned passing = __ballot_sync(kWholeWarp, passes);
    int start = 0;
    if (lane == 0 && passing) start = atomicAdd(&found_count, __popc(passing));
    const int slot = __shfl_sync(kWholeWarp, start, 0) + count_before(passing, lane);
    if (passes && slot < kCapacity) found[slot] = candidate;
  }
}

/// Counts what passes in the chosen tiles, and keeps it as long as there is room. By kRowWarps warps.
template <class T, int kRowWarps>
__device__ __forceinline__ void collect(const typename Vectors<T>::Row& row, const uint32_t* tiles, int tile_count,
                                        const Filter& filter, int warp, int lane, Candidate* found, int& found_count) {
  using V = Vectors<T>;
  constexpr int kTile = Cut<T>::kTile, kAtATime = 4;
  const auto is_inside = [&](int tile) { return row.has_around(tile * kTile, (tile + 1) * kTile - V::kIds); };
  const auto id_of = [&](int tile) { return lane < kTile / V::kIds ? tile * kTile + lane * V::kIds : row.vocab_size; };
  for (int first = warp; first < tile_count; first += kRowWarps * kAtATime) {
    uint4 vectors[kAtATime];
    int ids[kAtATime];
#pragma unroll
    for (int n = 0; n < kAtATime; ++n) {
      const int i = first + n * kRowWarps, tile = i < tile_count ? static_cast<int>(tiles[i]) : -1;
      ids[n] = tile >= 0 && is_inside(tile) ? id_of(tile) : -1;
      if (ids[n] >= 0) vectors[n] = row.load_inside(ids[n]);
    }
#pragma unroll 1
    for (int n = 0; n < kAtATime; ++n) {
      const int id = pick(ids, n);
      if (id >= 0) collect_vector<T>(pick(vectors, n), id, filter, lane, found, found_count);
    }
  }
#pragma unroll 1
  for (int i = warp; i < tile_count; i += kRowWarps) {
    const int tile = static_cast<int>(tiles[i]), id = id_of(tile);
    if (!is_inside(tile)) collect_vector<T>(row.load(id), id, filter, lane, found, found_count);
  }
}

/// The k best of each row, into `out.best`. The tiles have been chosen, found_count is 0, and a barrier lies between.
/// The caller needs a barrier before it reads the result.
template <class T, int kSides>
__device__ __forceinline__ void select(const typename Vectors<T>::Row& row, int k, Selection<kSides>& out) {
  constexpr int kRowThreads = Selection<kSides>::kRowThreads;
  const int side = thread_in_block() / kRowThreads, thread = thread_in_block() % kRowThreads;
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int id_bits = 32 - __clz(row.vocab_size);
  // At least k elements reach `low`, more than there is room for; fewer than k reach `high`.
  uint64_t low = static_cast<uint64_t>(out.bound[side] >> Vectors<T>::kOrderShift) << id_bits;
  uint64_t high = (static_cast<uint64_t>(out.top[side] >> Vectors<T>::kOrderShift) + 1) << id_bits;
  uint64_t least = low;
  for (;;) {
    const Filter filter{logit_of(out.bound[side]), least, id_bits, row.vocab_size};
    collect<T, kRowThreads / kWarpSize>(row, out.tiles[side], out.tile_count[side], filter, warp, lane, out.found[side],
                                        out.found_count[side]);
    __syncthreads();
    const int count = out.found_count[side];
    const bool too_many = count > kCapacity, too_few = count < k;
    if (!__syncthreads_or(too_many || too_few)) break;
    if (too_many) low = least;
    if (too_few) high = least;
    least = too_many || too_few ? low + (high - low) / 2 : least;
    if (thread == 0) out.found_count[side] = 0;
    __syncthreads();
  }
  const int count = out.found_count[side];
  for (int i = thread; i < count; i += kRowThreads) {
    const Candidate mine = out.found[side][i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += out.found[side][j] > mine;
    if (rank < k) out.best[side][rank] = mine;
  }
}

}  // namespace pruneopd::cuda
