// Everything that is read from the logits of one position, by one block, or by several that each take a slice of the
// units when there are few positions: then the last of them to finish does the rest. A position has one row, or two.
#pragma once

#include <algorithm>
#include <concepts>
#include <string>
#include <type_traits>

#include "launch.h"
#include "summary.cuh"
#include "views.cuh"

namespace pruneopd::cuda {

/// How many blocks share a multiprocessor, which limits the registers: enough to read while one of them selects. A
/// block that reads one row and selects nothing is light.
template <class T, bool kIsHeavy>
constexpr int kBlocks = std::is_same_v<T, AnyLogit> ? 2
                        : kIsHeavy                  ? 3
                                                    : 4;

/// What the kernels over logits take. Rows are numbered over the positions.
template <int kRowsOfPosition>
struct Rows {
  static constexpr int kSides = kRowsOfPosition;

  DeviceView logits[kSides];
  double temperatures[kSides];
  float scales[kSides];
  bool usable_scales;
  int vocab_size, k, tiles = 0, units = 0;
  int slices = 1;                    // blocks per position
  unsigned* arrivals = nullptr;      // counters from 0: [positions] of slices, if there are several; [responses]
  unsigned char* scratch = nullptr;  // [positions, scratch_bytes] if there are several slices
  int64_t scratch_bytes = 0;

  /// Where candidate j of position n lies in the outputs.
  __device__ int64_t slot(int n, int j) const { return int64_t{n} * k + j; }
  __device__ Scalar type(int side) const { return side == 0 ? logits[0].type : logits[kSides - 1].type; }
  __device__ double temperature(int side) const { return side == 0 ? temperatures[0] : temperatures[kSides - 1]; }
  __device__ float scale(int side) const { return side == 0 ? scales[0] : scales[kSides - 1]; }
  __device__ int position() const { return static_cast<int>(blockIdx.x) / slices; }
  __device__ int slice() const { return static_cast<int>(blockIdx.x) % slices; }
};

/// The dynamic shared memory of a kernel over logits: this, then the tile maxima and the records of the pass.
template <int kSides>
struct alignas(16) PositionMemory {
  Selection<kSides> selection;
  Summaries<kSides> summaries;
  const void* logits[kSides];                         // of the position
  alignas(16) double values[kSides][kMaxCandidates];  // for what follows
  bool is_last;

  __device__ static PositionMemory& get() { return *reinterpret_cast<PositionMemory*>(shared_memory); }

  __device__ float logit(int side, int j) const { return candidate_logit(selection.best[side][j]); }
  __device__ int id(int side, int j) const { return candidate_id(selection.best[side][j]); }
  /// Whether an id is among the first `count` candidates of row 1; for a thread that does not ask, no. By the block.
  __device__ bool is_in_row_1(bool asks, unsigned id, int count) {
    auto* const ids = reinterpret_cast<unsigned*>(values[0]);
    ids[thread_in_block()] = thread_in_block() < count ? this->id(1, thread_in_block()) : ~0u;
    __syncthreads();
    bool hit = false;
    for (int i = 0; asks && i < count; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(ids + i);
      hit |= four.x == id || four.y == id || four.z == id || four.w == id;
    }
    return hit;
  }
  /// How many of the k slots are not empty: the first ones. By the block.
  __device__ int filled(int side, int k) const {
    const int j = thread_in_block();
    return __syncthreads_count(j < k && logit(side, j) != -INFINITY);
  }
  /// Of a row relative to its greatest logit.
  __device__ RowSummary summary(const Rows<kSides>& args, int side) const {
    return summaries.rows[side].relative_to(summaries.peaks[side].logit, args.temperature(side));
  }
  __device__ bool broken(int side) const { return summaries.rows[side].broken; }
  __device__ bool broken() const { return broken(0) || broken(kSides - 1); }
};

/// Whether this block is the last of `expected` to arrive here; if so it sees what the others have written.
__device__ __forceinline__ bool arrives_last(unsigned* arrivals, int64_t expected, bool& is_last) {
  __syncthreads();
  if (thread_in_block() == 0) {
    __threadfence();
    is_last = atomicAdd(arrivals, 1u) + 1 == expected;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

__device__ __forceinline__ void copy_from_other_blocks(const unsigned char* from, unsigned char* to, int64_t bytes) {
  for (int64_t i = thread_in_block(); i < bytes / 16; i += kThreads)
    reinterpret_cast<uint4*>(to)[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
  __syncthreads();
}

/// Once all units have been passed: what they say of the position.
template <class T, Stats kStats, bool kSelects, int kSides>
__device__ __forceinline__ void summarize_position(const Rows<kSides>& args, const PassOutputs<kSides>& pass) {
  constexpr bool kHasStats = kStats != Stats::kNone;
  PositionMemory<kSides>& memory = PositionMemory<kSides>::get();
  auto* const orders = reinterpret_cast<uint32_t*>(pass.tile_max());
  for (int i = thread_in_block(); i < kSides * args.tiles; i += kThreads)
    orders[i] = short_order<Vectors<T>>(pass.tile_max()[i]);
  __syncthreads();

  Selection<kSides>& selection = memory.selection;
  Summaries<kSides>& summaries = memory.summaries;
  const int warp = thread_in_block() / kWarpSize, lane = thread_in_block() % kWarpSize,
            record_count = args.units * kWarps;
  const auto records_of = [&](int side) { return pass.records + side * record_count; };
  const auto row_of = [&](int side) { return make_row<T>(memory.logits[side], args.type(side), args.vocab_size); };
  const int side_of_warp = warp % kSides, task = warp / kSides;
  if (task == 0) {
    combine<kHasStats>(records_of(side_of_warp), records_of(kSides - 1 - side_of_warp), record_count, -1,
                       args.scale(side_of_warp), args.scale(kSides - 1 - side_of_warp), lane,
                       summaries.sums[side_of_warp], summaries.partner_misses[side_of_warp],
                       summaries.partner_origins[side_of_warp]);
  } else if (task == 1) {
    const Peak peak = find_peak<Vectors<T>>(orders + side_of_warp * args.tiles, args.tiles, lane);
    if (lane == 0) summaries.peaks[side_of_warp] = peak;
  } else if (task == 2 && kSelects) {
    uint32_t low = 0;
    const int chosen =
        choose(orders + side_of_warp * args.tiles, args.tiles, args.k, args.k, lane, low,
               [&](int slot, int tile) { selection.parts[side_of_warp][0][slot] = static_cast<uint32_t>(tile); });
    if (lane == 0) {
      selection.count[side_of_warp] = chosen;
      selection.low[side_of_warp] = low;
    }
  }
  __syncthreads();
  if constexpr (kSelects) select<T>(row_of(thread_in_block() / (kThreads / kSides)), args.k, selection);

  const auto lost_digits = [&](int side) { return !args.usable_scales || has_lost_digits(summaries.sums[side]); };
  const bool some_broken = summaries.peaks[0].broken() || summaries.peaks[kSides - 1].broken();
  const bool by_definition = kHasStats && !some_broken && (lost_digits(0) || lost_digits(kSides - 1));
#pragma unroll 1
  for (int side = 0; side < kSides; ++side) {
    RowSummary& summary = summaries.rows[side];  // the first thread's
    const Peak peak = summaries.peaks[side];
    const bool is_first = thread_in_block() == 0;
    if (peak.broken()) {
      if (is_first) summary = RowSummary::of_broken(peak.logit);
    } else if (lost_digits(side)) {
      const RowSummary exact = summarize_exactly(row_of(side), peak.logit, args.temperature(side), summaries);
      if (is_first) summary = exact;
    } else {
      set_peak_apart<T, kHasStats>(row_of(side), row_of(kSides - 1 - side), records_of(side),
                                   records_of(kSides - 1 - side), record_count, side, summaries);
      if (is_first) summary = RowSummary(summaries.sums[side], args.temperature(side));
    }
  }
  __syncthreads();
  if constexpr (kHasStats && kSides == 2) {
#pragma unroll 1
    for (int side = 0; side < (kStats == Stats::kAll ? kSides : 1); ++side) {
      double divergence = NAN;
      if (by_definition)
        divergence = diverge_exactly(row_of(side), row_of(1 - side), summaries.rows[side], summaries.rows[1 - side],
                                     args.temperature(side), args.temperature(1 - side), summaries);
      else if (!some_broken)
        divergence =
            summaries.partner_misses[side] ? INFINITY : kl_divergence(summaries.sums[side], summaries.sums[1 - side]);
      if (thread_in_block() == 0) summaries.divergences[side] = divergence;  // and reads them
    }
    set_peak_excess<T>(row_of(0), row_of(1), args.temperatures[0], args.temperatures[1], by_definition, summaries);
  }
}

/// Leaves the summaries of a position in the shared memory, and with kSelects the k candidates of each row. False:
/// another slice's block does.
template <class T, Stats kStats, bool kSelects, int kSides>
__device__ __forceinline__ bool pass_position(const Rows<kSides>& args, int n) {
  PositionMemory<kSides>& memory = PositionMemory<kSides>::get();
  typename Vectors<T>::Row rows[kSides];
  float scales[kSides];
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const void* const logits = args.logits[side].row(n);
    rows[side] = make_row<T>(logits, args.logits[side].type, args.vocab_size);
    scales[side] = args.scales[side];
  }

  unsigned char* const arrays = shared_memory + sizeof(PositionMemory<kSides>);
  unsigned char* const pass_arrays = args.slices == 1 ? arrays : args.scratch + n * args.scratch_bytes;
  const auto outputs_in = [&](unsigned char* at) {
    return PassOutputs<kSides>{reinterpret_cast<Record*>(at), args.tiles, args.units};
  };
  const int slice = args.slice();
  pass_units<T, kStats>(rows, scales, args.units * slice / args.slices, args.units * (slice + 1) / args.slices,
                        outputs_in(pass_arrays));
  n = args.position();
  if (thread_in_block() == 0)
    for (int side = 0; side < kSides; ++side) memory.logits[side] = args.logits[side].row(n);
  if (args.slices > 1) {
    if (!arrives_last(args.arrivals + n, args.slices, memory.is_last)) return false;
    copy_from_other_blocks(pass_arrays, arrays, args.scratch_bytes);
  } else {
    __syncthreads();
  }
  summarize_position<T, kStats, kSelects>(args, outputs_in(arrays));
  return true;
}

/// The kernel of every operator that reads the logits of a position once. `Op` holds what it takes, and says what is
/// summed (kStats), whether candidates are selected, which positions are read, and what is written.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads, kBlocks<T, decltype(Op::rows)::kSides == 2 || Op::kSelects>)
    positions_kernel(Op op) {
  const int n = op.rows.position();
  if (!op.reads(n)) {
    if (op.rows.slice() != 0) return;
    op.write_unread(n);
  } else {
    if (!pass_position<T, Op::kStats, Op::kSelects>(op.rows, n)) return;
    op.template write<T>(op.rows.position());
  }
  if constexpr (requires { op.finish(n); }) op.finish(op.rows.position());
}

// ---- The host's part.

inline float log2_scale(double temperature) {
  const double scale = 1 / (kLn2 * temperature);
  return scale > 1e-30 && scale < 1e30 ? static_cast<float>(scale) : 0;
}

template <class T, int kSides>
int64_t pass_bytes(int64_t vocab_size) {
  const int64_t bytes =
      kSides * (sizeof(Record) * Cut<T>::units(vocab_size) * kWarps + sizeof(float) * Cut<T>::tiles(vocab_size));
  return (bytes + 15) / 16 * 16;
}

/// The workspace that slices may take.
constexpr int64_t kWorkspaceBytes = 8 << 20;

/// Blocks a position: several if there are so few positions that the last round of blocks would leave most of the
/// device idle.
inline int slices_for(int64_t positions, int64_t units, int64_t bytes, const Queue& queue) {
  const int64_t wanted = 6 * device_attribute(cudaDevAttrMultiProcessorCount, queue);
  if (positions >= wanted || positions * (bytes + static_cast<int64_t>(sizeof(unsigned))) > kWorkspaceBytes) return 1;
  return static_cast<int>(std::min(units, (wanted + positions - 1) / positions));
}

/// Calls visit.operator()<T>() with a type of logits.
template <class Visit>
void with_logit_type(Scalar type, const Visit& visit) {
  if (type == Scalar::kBF16)
    visit.template operator()<BFloat16>();
  else if (type == Scalar::kF16)
    visit.template operator()<Half>();
  else
    visit.template operator()<float>();
}

/// The same with the type of all rows.
template <int kSides, class Visit>
void with_logit_type(const Rows<kSides>& rows, const Visit& visit) {
  if constexpr (kSides == 2)
    if (rows.logits[0].type != rows.logits[1].type) return visit.template operator()<AnyLogit>();
  with_logit_type(rows.logits[0].type, visit);
}

/// Runs an operator: a block takes a position, or a slice of one. `responses` count their positions as they arrive.
template <class Op>
void run_at_positions(const char* name, Op op, int64_t positions, const Queue& queue, int64_t responses = 0) {
  if (positions == 0) return;
  with_logit_type(op.rows, [&]<class T>() {
    auto& rows = op.rows;
    const int64_t vocab_size = rows.vocab_size;
    constexpr int kSides = std::remove_reference_t<decltype(rows)>::kSides;
    const int64_t bytes = pass_bytes<T, kSides>(vocab_size), shared = sizeof(PositionMemory<kSides>) + bytes;
    const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue);
    if (shared > limit)
      throw std::runtime_error(std::string(name) + ": vocab_size must be small enough for the tile maxima to fit in " +
                               std::to_string(limit) + " bytes of shared memory with impl='cuda', got " +
                               std::to_string(vocab_size));
    rows.tiles = Cut<T>::tiles(vocab_size);
    rows.units = Cut<T>::units(vocab_size);
    rows.slices = slices_for(positions, rows.units, bytes, queue);
    rows.scratch_bytes = rows.slices > 1 ? bytes : 0;
    const int64_t counter_bytes =
        ((rows.slices > 1 ? positions : 0) + responses) * static_cast<int64_t>(sizeof(unsigned));
    if (counter_bytes > 0) {
      rows.scratch = static_cast<unsigned char*>(queue.workspace(positions * rows.scratch_bytes + counter_bytes));
      rows.arrivals = reinterpret_cast<unsigned*>(rows.scratch + positions * rows.scratch_bytes);
      require(cudaMemsetAsync(rows.arrivals, 0, static_cast<size_t>(counter_bytes), queue.stream));
    }
    launch(&positions_kernel<T, Op>, positions * rows.slices, kThreads, shared, queue, op);
  });
}

/// What a kernel over one model's logits takes, or both models'; k is 0 if it selects no candidates. The launch sets
/// the rest.
template <std::same_as<Logits>... Side>
Rows<sizeof...(Side)> make_rows(int64_t k, const Side&... logits) {
  const bool usable = ((log2_scale(logits.temperature) > 0) && ...);
  return {.logits = {logits.rows...},
          .temperatures = {logits.temperature...},
          .scales = {(usable ? log2_scale(logits.temperature) : 1)...},
          .usable_scales = usable,
          .vocab_size = static_cast<int>(std::min({logits.vocab_size...})),
          .k = static_cast<int>(k)};
}

}  // namespace pruneopd::cuda
