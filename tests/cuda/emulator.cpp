// Not instrumented: ThreadSanitizer would see races where fibres meet. So what fibres share is not in the standard
// containers, whose code another, instrumented file may lend.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

#include "cuda_runtime.h"
#include "fibre.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

// --- the state of the block that runs ------------------------------------------------------------------------------

enum class State : uint8_t { kReady, kAtBlockBarrier, kInWarp, kLeft };

struct Thread {
  Thread();

  Fibre fibre;
  int id = 0, rank = 0;  // rank: its place in the order
  State state = State::kReady;

  // What it waits for, and what it gives and gets there.
  const char* name = nullptr;
  Place place;
  uint32_t mask = 0;
  uint64_t value = 0, got = 0;
  int source = 0;

  // What orders memory, for ThreadSanitizer.
  bool fenced = false;
  const void* last_atomic = nullptr;
};

/// The fibres of a block, used again by later ones. Under ThreadSanitizer what one fibre does is in order, so that it
/// would find nothing between blocks that share their fibres: then blocks in a row do not.
struct Fibres {
  std::unique_ptr<Thread> threads[kMostThreads];
  char tags[2] =
      {};  // used in turn: a thread that runs ahead to the next barrier must not release those still in this one
};
#ifdef EMULATOR_THREAD_SANITIZER
constexpr size_t kSets = 4;
#else
constexpr size_t kSets = 1;
#endif
std::unique_ptr<Fibres> sets[kSets];
Fibres* fibres;

struct Block {
  int threads = 0, left = 0;
  int at_barrier = 0, holding = 0, counted = 0;
  unsigned barriers = 0;
  int missing[kMostThreads / kWarpSize];  // the lane that was last waited for: mostly it still is
  uint64_t ready[kMostThreads / 64];      // by rank
  int by_rank[kMostThreads];
};
Block block;

Thread* running;
Fibre* host;
const std::function<void()>* body;
char failure[1000];
char launched, finished;  // tags

Counter* counter;  // of the kernel that was compiled elsewhere and ran last
Issued issued;

struct Fence {
  const char* name;
  Place place;
  bool ignored;
};
std::vector<Fence> fences;

// --- taking turns --------------------------------------------------------------------------------------------------

void set_ready(Thread& thread) {
  thread.state = State::kReady;
  block.ready[thread.rank / 64] |= uint64_t{1} << thread.rank % 64;
}

/// Lets the first thread that can go on do so, or the host where there is none.
void take_turns() {
  Thread& from = *running;
  for (int word = 0; word * 64 < block.threads; ++word)
    if (block.ready[word]) {
      Thread& to = *fibres->threads[block.by_rank[word * 64 + __builtin_ctzll(block.ready[word])]];
      if (&to == &from) return;
      running = &to;
      threadIdx.x = static_cast<unsigned>(to.id);
      return to.fibre.switch_from(from.fibre);
    }
  host->switch_from(from.fibre);
}

void wait(State state) {
  running->state = state;
  block.ready[running->rank / 64] &= ~(uint64_t{1} << running->rank % 64);
  take_turns();
}

/// Ends the launch from inside of a fibre, which is dropped as it stands and so must own nothing.
template <class... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  std::snprintf(failure, sizeof failure, format, values...);
  release(&finished);
  host->switch_from(running->fibre);
  std::abort();
}

void live() {
  for (;;) {
    acquire(&launched);
    (*body)();
    release(&finished);
    ++block.left;
    wait(State::kLeft);
  }
}

Thread::Thread() : fibre(live) {}

// --- places --------------------------------------------------------------------------------------------------------

std::string at(const char* name, const Place& place) {
  return std::string(name) + " " + place.file_name() + ":" + std::to_string(place.line());
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

/// Notes that a fence has been reached; returns whether it is to do nothing.
bool ignored(const char* name, const Place& place) {
  for (const Fence& fence : fences)
    if (same(fence.place, place)) return fence.ignored;
  fences.push_back({name, place, at(name, place) == ignored_fence});
  return fences.back().ignored;
}

/// What each thread of a block is doing that does not go on.
std::string deadlock() {
  std::ostringstream message;
  message << "block " << blockIdx.x << " cannot go on:";
  const auto doing = [](const Thread& thread) {
    return thread.state == State::kLeft ? "left" : "wait at " + at(thread.name, thread.place);
  };
  for (int first = 0, last; first < block.threads; first = last + 1) {
    const std::string what = doing(*fibres->threads[first]);
    for (last = first; last + 1 < block.threads && doing(*fibres->threads[last + 1]) == what;) ++last;
    message << "\n  threads " << first << " to " << last << " " << what;
  }
  return message.str();
}

// --- warps ---------------------------------------------------------------------------------------------------------

Thread* lane_of_warp(int lane) {
  const int id = running->id / kWarpSize * kWarpSize + lane;
  return id < block.threads ? fibres->threads[id].get() : nullptr;
}

bool is_with(const Thread& thread, const Thread& other) {
  return thread.state == State::kInWarp && thread.mask == other.mask && same(thread.place, other.place);
}

/// Waits for the lanes of the mask; the last one that comes calls finish().
template <class Finish>
void meet(const char* name, uint32_t mask, const Place& place, const Finish& finish) {
  Thread& me = *running;
  if (!(mask >> me.id % kWarpSize & 1))
    fail("thread %d is not in its own mask at %s %s:%u", me.id, name, place.file_name(), place.line());
  me.name = name;
  me.mask = mask;
  me.place = place;
  int& missing = block.missing[me.id / kWarpSize];
  for (int n = 0, first = missing; n < kWarpSize; ++n) {
    const int lane = (first + n) % kWarpSize;
    const Thread* other = mask >> lane & 1 ? lane_of_warp(lane) : &me;
    if (other == &me || (other && is_with(*other, me))) continue;
    missing = lane;
    return wait(State::kInWarp);
  }
  finish();
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) set_ready(*lane_of_warp(lane));
  take_turns();
}

// --- blocks --------------------------------------------------------------------------------------------------------

constexpr size_t kPage = 4096;
constexpr size_t kSharedBytes = 256 << 10;

}  // namespace
}  // namespace emulator

// As csrc/cuda declares it.
namespace pruneopd::cuda {
alignas(emulator::kPage) unsigned char shared_memory[emulator::kSharedBytes];
}

namespace emulator {
namespace {

using pruneopd::cuda::shared_memory;

void prepare_shared_memory(size_t bytes) {
  renew_pages(shared_memory, (bytes + kPage - 1) / kPage * kPage);
  allow(shared_memory, kSharedBytes);
  std::memset(shared_memory, 0xcd, bytes);
  forbid(shared_memory + bytes, kSharedBytes - bytes);
}

/// 0 .. count - 1 in one of the orders.
std::vector<unsigned> ordered(unsigned count, Order order, std::mt19937_64& random) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0u);
  if (order == Order::kBackward) std::reverse(all.begin(), all.end());
  if (order == Order::kShuffled) std::shuffle(all.begin(), all.end(), random);
  return all;
}

void run_block(size_t set, unsigned threads, const std::vector<unsigned>& order) {
  if (!sets[set]) sets[set] = std::make_unique<Fibres>();
  fibres = sets[set].get();
  block = Block{};
  block.threads = static_cast<int>(threads);
  for (unsigned rank = 0; rank < threads; ++rank) {
    std::unique_ptr<Thread>& thread = fibres->threads[order[rank]];
    if (!thread) thread = std::make_unique<Thread>();
    thread->id = static_cast<int>(order[rank]);
    thread->rank = static_cast<int>(rank);
    thread->fenced = false;
    thread->last_atomic = nullptr;
    block.by_rank[rank] = thread->id;
    set_ready(*thread);
  }
  running = fibres->threads[order[0]].get();
  threadIdx.x = order[0];
  release(&launched);
  running->fibre.switch_from(*host);
  if (!*failure && block.left == block.threads) {
    if (counter) counter->end_block();
    return;
  }

  acquire(&finished);
  const std::string what = *failure ? failure : deadlock();
  *failure = 0;
  for (std::unique_ptr<Fibres>& dropped : sets) dropped.reset();
  throw std::logic_error(what);
}

}  // namespace

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  Fibre here;
  host = &here;
  body = &thread;
  fences.reserve(1000);  // memory that a fibre allocated would itself be a race, and hide that a fence is not needed
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  std::mt19937_64 random(settings.seed);
  size_t run = 0;
  for (const unsigned n : ordered(blocks, settings.blocks, random)) {
    blockIdx.x = n;
    prepare_shared_memory(shared_bytes);
    run_block(run++ % kSets, threads, ordered(threads, settings.threads, random));
  }
  acquire(&finished);
}

// --- what kernels call ---------------------------------------------------------------------------------------------

int block_barrier(const char* name, bool condition, Place place) {
  Thread& me = *running;
  if (ignored(name, place)) return condition;
  const char* tag = &fibres->tags[block.barriers % 2];
  release(tag);
  me.name = name;
  me.place = place;
  block.holding += condition;
  if (++block.at_barrier < block.threads) {
    wait(State::kAtBlockBarrier);
  } else {
    for (int n = 0; n < block.threads; ++n)
      if (const Thread& other = *fibres->threads[n]; !same(other.place, place))
        fail("thread %d is at another barrier, %s %s:%u, than thread %d at %s %s:%u", n, other.name,
             other.place.file_name(), other.place.line(), me.id, name, place.file_name(), place.line());
    block.counted = std::exchange(block.holding, 0);
    block.at_barrier = 0;
    ++block.barriers;
    for (int n = 0; n < block.threads; ++n) set_ready(*fibres->threads[n]);
    take_turns();
  }
  acquire(tag);
  return block.counted;
}

uint64_t shuffle(const char* name, uint32_t mask, uint64_t value, int source, Place place) {
  Thread& me = *running;
  me.value = value;
  me.source = source;
  meet(name, mask, place, [&] {
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) {
        Thread& to = *lane_of_warp(lane);
        if (!(mask >> to.source & 1))
          fail("thread %d takes the value of a lane outside of its mask at %s %s:%u", to.id, name, place.file_name(),
               place.line());
        to.got = lane_of_warp(to.source)->value;
      }
  });
  return me.got;
}

uint64_t reduce(const char* name, uint32_t mask, uint64_t value, uint64_t (*join)(uint64_t, uint64_t), Place place) {
  Thread& me = *running;
  me.value = value;
  meet(name, mask, place, [&] {
    uint64_t all = value;  // of the lane that is here
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1 && lane_of_warp(lane) != &me) all = join(all, lane_of_warp(lane)->value);
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) lane_of_warp(lane)->got = all;
  });
  return me.got;
}

uint32_t ballot(const char* name, uint32_t mask, bool condition, Place place) {
  const uint64_t bit = uint64_t{condition} << running->id % kWarpSize;
  return static_cast<uint32_t>(reduce(name, mask, bit, [](uint64_t a, uint64_t b) { return a | b; }, place));
}

void thread_fence(Place place) {
  if (ignored("__threadfence", place)) return;
  Thread& me = *running;
  me.fenced = true;
  if (me.last_atomic) acquire(me.last_atomic);
}

void note_atomic(const void* at) {
  Thread& me = *running;
  if (me.fenced) release(at);
  me.fenced = false;
  me.last_atomic = at;
}

const bool kFindsRaces = kSets > 1;

std::vector<std::string> take_fences() {
  std::vector<std::string> names;
  for (const Fence& fence : fences) names.push_back(at(fence.name, fence.place));
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  fences.clear();
  return names;
}

}  // namespace emulator

// --- kernels that were compiled elsewhere --------------------------------------------------------------------------

namespace emulator {
namespace {

struct Entry {
  const void* kernel;
  Body body;
};
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace

Compiled::Compiled(const void* kernel, Body body) { entries().push_back({kernel, body}); }

Body body_of(const void* kernel) {
  for (const Entry& entry : entries())
    if (entry.kernel == kernel) return entry.body;
  if (!entries().empty()) throw std::logic_error("a kernel has no PTX");
  return nullptr;
}

void misaligned(uint64_t address, int bytes) {
  fail("thread %d of block %u: a misaligned access of %d bytes at 0x%llx", running->id, blockIdx.x, bytes,
       static_cast<unsigned long long>(address));
}

Counter::Counter(std::span<const Issued> basic_blocks)
    : basic_blocks_(basic_blocks), counts_(kMostThreads * basic_blocks.size()) {}

uint32_t* Counter::of_thread() {
  counter = this;
  return &counts_[static_cast<size_t>(running->id) * basic_blocks_.size()];
}

void Counter::end_block() {
  const size_t size = basic_blocks_.size();
  for (int warp = 0; warp < block.threads; warp += kWarpSize)
    for (size_t n = 0; n < size; ++n) {
      uint64_t most = 0;
      for (int lane = 0; lane < std::min(kWarpSize, block.threads - warp); ++lane) {
        const uint32_t count = std::exchange(counts_[static_cast<size_t>(warp + lane) * size + n], 0);
        most = std::max<uint64_t>(most, count);
        issued.of_threads += basic_blocks_[n].instructions * count;
      }
      issued.instructions += most * basic_blocks_[n].instructions;
      issued.float64 += most * basic_blocks_[n].float64;
    }
}

Issued take_issued() { return std::exchange(issued, {}); }

}  // namespace emulator

// --- what the host calls -------------------------------------------------------------------------------------------

namespace {

struct KernelLimit {
  const void* kernel;
  int shared_bytes;
};
std::vector<KernelLimit> limits;

int shared_limit(const void* kernel) {
  constexpr int kWithoutAsking = 48 << 10;
  for (const KernelLimit& limit : limits)
    if (limit.kernel == kernel) return limit.shared_bytes;
  return std::min(kWithoutAsking, emulator::settings.shared_bytes_of_a_block);
}

}  // namespace

cudaError_t emulator_launch(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                            const std::function<void()>& thread) {
  if (grid.x < 1 || grid.x > INT32_MAX || threads.x < 1 || threads.x > emulator::kMostThreads)
    return cudaErrorInvalidConfiguration;
  if (grid.y != 1 || grid.z != 1 || threads.y != 1 || threads.z != 1) return cudaErrorNotSupported;
  if (shared_bytes > static_cast<size_t>(shared_limit(kernel))) return cudaErrorInvalidValue;
  emulator::run_grid(grid.x, threads.x, shared_bytes, thread);
  return cudaSuccess;
}

cudaError_t emulator_set_shared_limit(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  if (bytes < 0 || bytes > emulator::settings.shared_bytes_of_a_block) return cudaErrorInvalidValue;
  limits.erase(
      std::remove_if(limits.begin(), limits.end(), [&](const KernelLimit& limit) { return limit.kernel == kernel; }),
      limits.end());
  limits.push_back({kernel, bytes});
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::settings.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::settings.shared_bytes_of_a_block;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
