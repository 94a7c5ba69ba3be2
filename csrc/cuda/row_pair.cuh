// Everything that is read from the logits of one position, by one block, or by several that each take a slice of the
// units when there are few positions: then the last of them to finish does the rest.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "launch.h"
#include "summary.cuh"
#include "views.cuh"

namespace pruneopd::cuda {

/// How many blocks share a multiprocessor, which limits the registers: enough to read while one of them selects.
template <class T>
constexpr int kBlocksPerMultiprocessor = std::is_same_v<T, AnyLogit> ? 2 : 3;

/// What the kernels over logits take. Rows are numbered over the positions.
struct RowPairs {
  DeviceView student, teacher;
  double student_temperature, teacher_temperature;
  float student_scale, teacher_scale;
  bool usable_scales;
  int vocab_size, k, tiles, units;
  int slices;              // blocks a position
  unsigned* arrivals;      // counters, 0 at first: [positions] of slices, when there are several; [responses]
  unsigned char* scratch;  // [positions, scratch_bytes] when there are several slices
  int64_t scratch_bytes;

  /// Where candidate j of position n lies in the outputs.
  __device__ int64_t slot(int n, int j) const { return int64_t{n} * k + j; }
  __device__ Scalar type(int side) const { return side == 0 ? student.type : teacher.type; }
  __device__ double temperature(int side) const { return side == 0 ? student_temperature : teacher_temperature; }
  __device__ float scale(int side) const { return side == 0 ? student_scale : teacher_scale; }
  __device__ int position() const { return static_cast<int>(blockIdx.x) / slices; }
  __device__ int slice() const { return static_cast<int>(blockIdx.x) % slices; }
};

/// The dynamic shared memory of a kernel over logits: this, then the tile maxima and the records of the pass.
struct alignas(16) RowPairMemory {
  Selection selection;
  Summaries summaries;
  int position;
  const void* logits[kSides];             // of the position
  double values[kSides][kMaxCandidates];  // for what follows
  bool is_last;

  __device__ static RowPairMemory& get() { return *reinterpret_cast<RowPairMemory*>(shared_memory); }

  __device__ float logit(int side, int j) const { return candidate_logit(selection.best[side][j]); }
  __device__ int id(int side, int j) const { return candidate_id(selection.best[side][j]); }
  __device__ bool broken(int side) const { return summaries.rows[side].broken; }
  __device__ bool broken() const { return broken(0) || broken(1); }
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

/// Leaves candidates and summaries of a position in the shared memory. False: another slice's block does.
template <class T, bool kStats>
__device__ __forceinline__ bool pass_row_pair(const RowPairs& args, int n) {
  RowPairMemory& memory = RowPairMemory::get();
  const void* const student = args.student.row(n);
  const void* const teacher = args.teacher.row(n);
  if (thread_in_block() == 0) {
    memory.position = n;
    memory.logits[0] = student;
    memory.logits[1] = teacher;
  }

  unsigned char* const arrays = shared_memory + sizeof(RowPairMemory);
  unsigned char* const pass_arrays = args.slices == 1 ? arrays : args.scratch + n * args.scratch_bytes;
  const auto outputs_in = [&](unsigned char* at) {
    const int64_t records = kSides * sizeof(Record) * args.units * kWarps;
    return PassOutputs{reinterpret_cast<float*>(at + records), reinterpret_cast<Record*>(at), args.tiles, args.units};
  };
  const int slice = args.slice();
  pass_units<T, kStats>(make_row<T>(student, args.student.type, args.vocab_size),
                        make_row<T>(teacher, args.teacher.type, args.vocab_size), args.student_scale,
                        args.teacher_scale, args.units * slice / args.slices, args.units * (slice + 1) / args.slices,
                        outputs_in(pass_arrays));
  if (args.slices > 1) {
    if (!arrives_last(args.arrivals + n, args.slices, memory.is_last)) return false;
    copy_from_other_blocks(pass_arrays, arrays, args.scratch_bytes);
  } else {
    __syncthreads();
  }

  const PassOutputs pass = outputs_in(arrays);
  auto* const orders = reinterpret_cast<uint32_t*>(pass.tile_max);
  for (int i = thread_in_block(); i < kSides * args.tiles; i += kThreads) orders[i] = order_of(pass.tile_max[i]);
  __syncthreads();

  Selection& selection = memory.selection;
  Summaries& summaries = memory.summaries;
  const int warp = thread_in_block() / kWarpSize, lane = thread_in_block() % kWarpSize,
            record_count = args.units * kWarps;
  const auto records_of = [&](int side) { return pass.records + side * record_count; };
  if (warp < kSides) {
    choose_tiles<T>(orders + warp * args.tiles, args.tiles, args.k, lane, selection.tiles[warp],
                    selection.tile_count[warp], selection.bound[warp], selection.top[warp]);
    if (lane == 0) selection.found_count[warp] = 0;
  } else if (warp < 2 * kSides) {
    const int side = warp - kSides;
    combine<kStats>(records_of(side), records_of(1 - side), record_count, -1, args.scale(side), args.scale(1 - side),
                    lane, summaries.sums[side], summaries.partner_misses[side], summaries.partner_origins[side]);
  }
  __syncthreads();
  const auto row_of = [&](int side) { return make_row<T>(memory.logits[side], args.type(side), args.vocab_size); };
  select<T>(row_of(thread_in_block() / kRowThreads), args.k, selection);

  const auto lost_digits = [&](int side) { return !args.usable_scales || has_lost_digits(summaries.sums[side]); };
  const bool some_broken = is_broken(memory.logit(0, 0)) || is_broken(memory.logit(1, 0));
  const bool by_definition = kStats && !some_broken && (lost_digits(0) || lost_digits(1));
#pragma unroll 1
  for (int side = 0; side < kSides; ++side) {
    RowSummary summary;
    if (is_broken(memory.logit(side, 0))) {
      summary = RowSummary::of_broken(memory.logit(side, 0));
    } else if (lost_digits(side)) {
      summary = summarize_exactly(row_of(side), memory.logit(side, 0), args.temperature(side), summaries);
    } else {
      set_peak_apart<T, kStats>(row_of(side), row_of(1 - side), records_of(side), records_of(1 - side), record_count,
                                selection.best[side][0], side, summaries);
      summary = RowSummary(summaries.sums[side], args.temperature(side), kStats);
    }
    if (thread_in_block() == 0) summaries.rows[side] = summary;
  }
  __syncthreads();
  if constexpr (kStats) {
#pragma unroll 1
    for (int side = 0; side < kSides; ++side) {
      double divergence = NAN;
      if (by_definition)
        divergence = diverge_exactly(row_of(side), row_of(1 - side), summaries.rows[side], summaries.rows[1 - side],
                                     args.temperature(side), args.temperature(1 - side), summaries);
      else if (!some_broken)
        divergence =
            summaries.partner_misses[side] ? INFINITY : kl_divergence(summaries.sums[side], summaries.sums[1 - side]);
      if (thread_in_block() == 0) summaries.divergences[side] = divergence;  // and reads them
    }
  }
  return true;
}

// ---- The host's part.

inline float log2_scale(double temperature) {
  const double scale = 1 / (kLn2 * temperature);
  return scale > 1e-30 && scale < 1e30 ? static_cast<float>(scale) : 0;
}

template <class T>
int64_t pass_bytes(int64_t vocab_size) {
  const int64_t bytes =
      kSides * (sizeof(Record) * Cut<T>::units(vocab_size) * kWarps + sizeof(float) * Cut<T>::tiles(vocab_size));
  return (bytes + 15) / 16 * 16;
}

/// The workspace that slices may take.
constexpr int64_t kWorkspaceBytes = 1 << 20;

/// Blocks a position: several where the positions would not fill the device.
inline int slices_for(int64_t positions, int64_t units, int64_t bytes, const Queue& queue) {
  const int64_t wanted = 2 * device_attribute(cudaDevAttrMultiProcessorCount, queue);
  if (positions >= wanted / 2 || positions * (bytes + static_cast<int64_t>(sizeof(unsigned))) > kWorkspaceBytes)
    return 1;
  return static_cast<int>(std::min(units, (wanted + positions - 1) / positions));
}

/// Calls visit.operator()<T>() with the type of both rows.
template <class Visit>
void with_logit_type(const LogitsPair& logits, const Visit& visit) {
  const bool same = logits.student.type == logits.teacher.type;
  if (same && logits.student.type == Scalar::kBF16)
    visit.template operator()<BFloat16>();
  else if (same && logits.student.type == Scalar::kF16)
    visit.template operator()<Half>();
  else if (same)
    visit.template operator()<float>();
  else
    visit.template operator()<AnyLogit>();
}

/// Launches a kernel whose parameters hold `rows`. `responses` of them count their positions as they arrive.
template <class T, class Params>
void launch_over_logits(void (*kernel)(Params), const char* op, const LogitsPair& logits, int64_t positions,
                        int64_t responses, Params params, const Queue& queue) {
  RowPairs& rows = params.rows;
  const int64_t bytes = pass_bytes<T>(logits.vocab_size), shared = sizeof(RowPairMemory) + bytes;
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue);
  if (shared > limit)
    throw std::runtime_error(std::string(op) + ": vocab_size must be small enough for the tile maxima to fit in " +
                             std::to_string(limit) + " bytes of shared memory with impl='cuda', got " +
                             std::to_string(logits.vocab_size));
  rows.tiles = Cut<T>::tiles(logits.vocab_size);
  rows.units = Cut<T>::units(logits.vocab_size);
  rows.slices = slices_for(positions, rows.units, bytes, queue);
  rows.scratch_bytes = rows.slices > 1 ? bytes : 0;
  const int64_t counter_bytes =
      ((rows.slices > 1 ? positions : 0) + responses) * static_cast<int64_t>(sizeof(unsigned));
  if (counter_bytes > 0) {
    rows.scratch = static_cast<unsigned char*>(queue.workspace(positions * rows.scratch_bytes + counter_bytes));
    rows.arrivals = reinterpret_cast<unsigned*>(rows.scratch + positions * rows.scratch_bytes);
    require(cudaMemsetAsync(rows.arrivals, 0, static_cast<size_t>(counter_bytes), queue.stream));
  }
  launch(kernel, positions * rows.slices, kThreads, shared, queue, params);
}

inline RowPairs make_row_pairs(const LogitsPair& logits, int64_t k) {
  const float student_scale = log2_scale(logits.student_temperature),
              teacher_scale = log2_scale(logits.teacher_temperature);
  const bool usable = student_scale > 0 && teacher_scale > 0;
  return {.student = DeviceView(logits.student),
          .teacher = DeviceView(logits.teacher),
          .student_temperature = logits.student_temperature,
          .teacher_temperature = logits.teacher_temperature,
          .student_scale = usable ? student_scale : 1,
          .teacher_scale = usable ? teacher_scale : 1,
          .usable_scales = usable,
          .vocab_size = static_cast<int>(logits.vocab_size),
          .k = static_cast<int>(k),
          .tiles = 0,
          .units = 0,
          .slices = 1,
          .arrivals = nullptr,
          .scratch = nullptr,
          .scratch_bytes = 0};
}

}  // namespace pruneopd::cuda
