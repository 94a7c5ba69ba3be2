// CUDA's blocks, warps and barriers on a CPU, for tests. Each thread of a block is a fibre, blocks run one after the
// other, and of the threads that can go on it is always the first in a chosen order that does: a warp runs as far ahead
// of the others as it can. The names of CUDA that kernels use are in include/cuda_runtime.h.
//
// What is thrown as a std::logic_error, and never hangs: threads that wait for each other at different places or for
// one that has left, a warp's operation without some of its lanes, a shuffle from a lane that takes no part.
// ThreadSanitizer knows what orders memory (barriers; __threadfence beside an atomic operation, also between blocks)
// and what does not (shuffles, votes, and how fibres happen to take turns), so that it finds a fence that is missing.
// A block that waits for another one hangs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <span>
#include <string>
#include <vector>

namespace emulator {

enum class Order { kForward, kBackward, kShuffled };

/// What launches go by from now on.
struct Settings {
  Order threads = Order::kForward, blocks = Order::kForward;
  uint64_t seed = 0;
  int multiprocessors = 132;
  int shared_bytes_of_a_block = 227 << 10;
};
inline Settings settings;

/// The places of all barriers (__syncthreads and its kin) and of all __threadfence that have been reached
/// since the last call.
std::vector<std::string> take_fences();
/// One of them that does nothing: threads pass by, each as if it were alone.
inline std::string ignored_fence;

/// Whether ThreadSanitizer watches; a barrier of 256 threads then takes a millisecond.
extern const bool kFindsRaces;

// --- what cuda_runtime.h is made of --------------------------------------------------------------------------------

using Place = std::source_location;

constexpr int kWarpSize = 32;
constexpr int kMostThreads = 1024;

/// Runs a grid of threads, each of which calls `thread`.
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

/// All threads of the block wait for each other; returns how many hold the condition.
int block_barrier(const char* name, bool condition, Place place);

/// The value of another lane.
uint64_t shuffle(const char* name, uint32_t mask, uint64_t value, int source, Place place);
/// For each lane whether it holds the condition.
uint32_t ballot(const char* name, uint32_t mask, bool condition, Place place);
/// The values of all lanes in one.
uint64_t reduce(const char* name, uint32_t mask, uint64_t value, uint64_t (*join)(uint64_t, uint64_t), Place place);

void thread_fence(Place place);
/// Follows an atomic operation, which makes known to other blocks what a fence has ordered.
void note_atomic(const void* at);

// --- kernels that were compiled elsewhere: the PTX of nvcc (see ptx/) ------------------------------------------------

/// Runs one thread; takes the addresses of the kernel's parameters.
using Body = void (*)(void* const* parameters);

/// From now on the kernel's body. If any kernel has one, every kernel that is launched must.
struct Compiled {
  Compiled(const void* kernel, Body body);
};
/// A kernel's body; null: its source.
Body body_of(const void* kernel);

[[noreturn]] void misaligned(uint64_t address, int bytes);

/// Instructions: issued by warps, those of them that compute in float64, and executed by threads.
struct Issued {
  uint64_t instructions = 0, float64 = 0, of_threads = 0;
};

/// Counts how often each thread reaches each of a kernel's basic blocks. A warp issues a basic block as often as the
/// lane that reaches it most often.
class Counter {
 public:
  explicit Counter(std::span<const Issued> basic_blocks);
  /// Where the thread that runs counts.
  uint32_t* of_thread();
  /// Adds up what the block's warps have issued.
  void end_block();

 private:
  std::span<const Issued> basic_blocks_;
  std::vector<uint32_t> counts_;
};

/// What all warps have issued since the last call.
Issued take_issued();

}  // namespace emulator
