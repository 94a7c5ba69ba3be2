// The emulator itself: what it computes, and that it reports what is wrong. Kernels here are as small as can be.
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>

#include "../cpp/harness.h"
#include "emulator.h"
#include "ptx/machine.h"

namespace pruneopd::cuda {
extern __shared__ __align__(16) unsigned char shared_memory[];
}

namespace {

using emulator::Order;
using pruneopd::cuda::shared_memory;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 96;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
                   Arguments... arguments) {
  return [&](Parameters... parameters) {
    void* addresses[] = {static_cast<void*>(&parameters)..., nullptr};
    return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses, shared_bytes, nullptr);
  }(arguments...);
}

/// Calls test() in every order of threads and blocks.
template <class F>
void in_every_order(const F& test) {
  for (const Order threads : {Order::kForward, Order::kBackward, Order::kShuffled})
    for (const Order blocks : {Order::kForward, Order::kBackward, Order::kShuffled}) {
      emulator::settings.threads = threads;
      emulator::settings.blocks = blocks;
      emulator::settings.seed += 1;
      test();
    }
  emulator::settings = {};
}

template <class F>
std::string error_of(const F& test) {
  try {
    test();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "no error";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// --- threads and blocks --------------------------------------------------------------------------------------------

__global__ void number(int* out, int offset) {
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      static_cast<int>(gridDim.x * 1000 + blockIdx.x * blockDim.x + threadIdx.x) + offset;
}

TEST(every_thread_of_every_block_runs_once) {
  in_every_order([] {
    std::vector<int> got(4 * kThreads), want(got);
    std::iota(want.begin(), want.end(), 4007);
    CHECK(launch(number, 4, kThreads, 0, got.data(), 7) == cudaSuccess);
    CHECK(got == want);
  });
}

__global__ void note_order(int* out, int* next) {
  out[atomicAdd(next, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(orders_are_what_they_say) {
  std::set<std::vector<int>> orders;
  in_every_order([&] {
    std::vector<int> order(6 * 32), sorted(order), again(order);
    int next = 0;
    launch(note_order, 6, 32, 0, order.data(), &next);
    orders.insert(order);
    const emulator::Settings& settings = emulator::settings;
    if (settings.threads == Order::kForward && settings.blocks == Order::kBackward)
      CHECK(order[0] == 160 && order[191] == 31);
    if (settings.threads == Order::kBackward && settings.blocks == Order::kForward)
      CHECK(order[0] == 31 && order[191] == 160);
    next = 0;
    launch(note_order, 6, 32, 0, again.data(), &next);
    CHECK(order == again);
    std::iota(sorted.begin(), sorted.end(), 0);
    std::sort(order.begin(), order.end());
    CHECK(order == sorted);
  });
  CHECK(orders.size() == 9);
}

// --- barriers ------------------------------------------------------------------------------------------------------

__global__ void pass_along(int* out, int rounds) {
  int* values = reinterpret_cast<int*>(shared_memory);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  values[thread] = thread;
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    const int next = values[(thread + 1) % threads];
    __syncthreads();
    values[thread] = next;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[thread];
}

TEST(threads_wait_at_a_barrier) {
  in_every_order([] {
    std::vector<int> got(2 * kThreads);
    launch(pass_along, 2, kThreads, kThreads * sizeof(int), got.data(), 5);
    for (int n = 0; n < 2 * kThreads; ++n) CHECK(got[n] == (n % kThreads + 5) % kThreads);
  });
}

__global__ void count_conditions(int* out) {
  const int me = static_cast<int>(threadIdx.x), partner = static_cast<int>(blockDim.x) - 1 - me;
  int* values = reinterpret_cast<int*>(shared_memory);
  values[me] = 1;
  const bool any = __syncthreads_or(me == 70);
  values[kThreads + me] = values[partner];
  const bool more = __syncthreads_or(me > 1000);
  values[me] = values[kThreads + partner];
  const int count = __syncthreads_count(me % 3 == 0);
  out[me] = any && !more ? count + values[partner] : 0;
}

TEST(barriers_count_conditions) {
  in_every_order([] {
    std::vector<int> got(kThreads), want(kThreads, kThreads / 3 + 1);
    launch(count_conditions, 1, kThreads, 2 * kThreads * sizeof(int), got.data());
    CHECK(got == want);
  });
}

__global__ void leave_early() {
  if (threadIdx.x >= 64) return;
  __syncthreads();
}

__global__ void meet_at_two_places() {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void warps_wait_for_each_other() {
  if (threadIdx.x < 32)
    __any_sync(kAll, 1);
  else
    __syncthreads();
}

TEST(threads_that_wait_in_vain_are_reported) {
  in_every_order([] {
    if (emulator::settings.blocks != Order::kForward) return;
    const std::string left = error_of([] { launch(leave_early, 1, kThreads, 0); });
    CHECK(contains(left, "threads 0 to 63 wait at __syncthreads") && contains(left, "threads 64 to 95 left"));
    CHECK(contains(error_of([] { launch(meet_at_two_places, 1, kThreads, 0); }), "is at another barrier"));
    CHECK(contains(error_of([] { launch(warps_wait_for_each_other, 1, kThreads, 0); }), "threads 0 to 31 left"));
    // The emulator survives it.
    CHECK(error_of([] { launch(warps_wait_for_each_other, 1, 32, 0); }) == "no error");
  });
}

// --- warps ---------------------------------------------------------------------------------------------------------

template <class T>
__global__ void shuffle_about(T* out, T scale) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T value = static_cast<T>(threadIdx.x) * scale;
  T* row = out + 5 * threadIdx.x;
  row[0] = __shfl_sync(kAll, value, 5);
  row[1] = __shfl_sync(kAll, value, 31 - lane);
  row[2] = __shfl_sync(kAll, value, 3, 8);
  row[3] = __shfl_xor_sync(kAll, value, 9);
  row[4] = lane < 16 ? __shfl_sync(0xffffu, value, 1) : __shfl_xor_sync(0xffff0000u, value, 1);
}

template <class T>
void test_shuffles(T scale) {
  in_every_order([scale] {
    std::vector<T> got(5 * kThreads);
    launch(shuffle_about<T>, 1, kThreads, 0, got.data(), scale);
    for (int n = 0; n < kThreads; ++n) {
      const int lane = n % 32, warp = n - lane;
      const int want[5] = {5, 31 - lane, lane / 8 * 8 + 3, lane ^ 9, lane >= 16 ? lane ^ 1 : 1};
      for (int j = 0; j < 5; ++j) CHECK(got[5 * n + j] == static_cast<T>(warp + want[j]) * scale);
    }
  });
}

TEST(lanes_shuffle_values) {
  test_shuffles<int>(-3);
  test_shuffles<unsigned>(0x1000001u);
  test_shuffles<float>(-.25f);
  test_shuffles<double>(.1);
  test_shuffles<int64_t>(-0x1000000001);
  test_shuffles<unsigned long long>(0x8000000000000001);
}

__global__ void vote(unsigned* out) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned* row = out + 10 * threadIdx.x;
  row[0] = __ballot_sync(kAll, lane % 3 == warp);
  row[1] = __any_sync(kAll, lane == 7 && warp == 1) != 0;
  row[2] = __reduce_max_sync(kAll, lane ^ 0x80000015u);
  row[3] = __reduce_min_sync(kAll, lane ^ 0x80000015u);
  row[4] = __reduce_add_sync(kAll, lane + 0xffffff00u);
  row[5] = static_cast<unsigned>(__reduce_max_sync(kAll, static_cast<int>(lane) - 40));
  row[6] = static_cast<unsigned>(__reduce_min_sync(kAll, static_cast<int>(lane) - 20));
  row[7] = static_cast<unsigned>(__reduce_add_sync(kAll, -static_cast<int>(lane)));
  row[8] = lane < 4 ? __ballot_sync(0xfu, lane != 2) : 0;
  row[9] = __any_sync(0xff00ff00u >> (lane & 8 ? 0 : 8), lane == 9) != 0;
}

TEST(lanes_vote_and_reduce) {
  in_every_order([] {
    std::vector<unsigned> got(10 * kThreads);
    launch(vote, 1, kThreads, 0, got.data());
    for (int n = 0; n < kThreads; ++n) {
      const unsigned lane = n % 32, warp = n / 32;
      const unsigned thirds[3] = {0x49249249u, 0x92492492u, 0x24924924u};
      const unsigned want[10] = {thirds[warp], warp == 1, 0x8000001fu, 0x80000000u,         496u - 32u * 256,
                                 -9u,          -20u,      -496u,       lane < 4 ? 0xbu : 0, (lane & 8) != 0};
      CHECK(std::equal(want, want + 10, &got[10 * n]));
    }
  });
}

__global__ void shuffle_without_itself() { __shfl_sync(0xfffffffeu, 1, 1); }
__global__ void shuffle_from_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 16);
}
__global__ void shuffle_without_some() {
  if (threadIdx.x != 20) __shfl_sync(kAll, 1, 3);
}
__global__ void vote_in_branches() {
  if (threadIdx.x < 20)
    __ballot_sync(kAll, 1);
  else
    __ballot_sync(kAll, 0);
}

TEST(lanes_that_are_missing_are_reported) {
  in_every_order([] {
    if (emulator::settings.blocks != Order::kForward) return;
    CHECK(contains(error_of([] { launch(shuffle_without_itself, 1, 32, 0); }), "thread 0 is not in its own mask"));
    CHECK(contains(error_of([] { launch(shuffle_from_outside, 1, 32, 0); }), "a lane outside of its mask"));
    CHECK(contains(error_of([] { launch(shuffle_without_some, 1, 32, 0); }), "threads 20 to 20 left"));
    CHECK(contains(error_of([] { launch(shuffle_about<int>, 1, 31, 0, static_cast<int*>(nullptr), 0); }),
                   "cannot go on"));
    CHECK(contains(error_of([] { launch(vote_in_branches, 1, 32, 0); }), "threads 0 to 19 wait at __ballot_sync"));
  });
}

// --- shared memory -------------------------------------------------------------------------------------------------

__global__ void find_what_is_there(int* out) {
  if (threadIdx.x == 0) atomicAdd(out, shared_memory[0] == 0xcd && shared_memory[99] == 0xcd);
  __syncthreads();
  shared_memory[threadIdx.x] = 0;
}

TEST(every_block_finds_garbage_in_shared_memory) {
  int found = 0;
  launch(find_what_is_there, 5, 100, 100, &found);
  CHECK(found == 5);
}

#ifdef __SANITIZE_ADDRESS__

__global__ void write_beyond() { shared_memory[threadIdx.x + 1] = 0; }

__global__ void read_beyond(int* out) {
  int mine[2] = {1, 2};
  __syncthreads();
  *out = mine[*out];
}

/// Whether AddressSanitizer ends a process that does this.
template <class F>
bool dies(const F& run) {
  const pid_t child = fork();
  if (child == 0) {
    close(STDERR_FILENO);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

TEST(memory_errors_of_a_kernel_show) {
  int out = 1;
  CHECK(!dies([] { launch(write_beyond, 2, 32, 33); }) && dies([] { launch(write_beyond, 2, 32, 32); }));
  CHECK(!dies([&] { launch(read_beyond, 1, 1, 0, &out); }));
  out = 2;
  CHECK(dies([&] { launch(read_beyond, 1, 1, 0, &out); }));
}

#endif

TEST(a_launch_keeps_to_the_limits) {
  int out = 0;
  emulator::settings.shared_bytes_of_a_block = 99 << 10;
  CHECK(launch(find_what_is_there, 1, 100, 48 << 10, &out) == cudaSuccess);
  CHECK(launch(find_what_is_there, 1, 100, (48 << 10) + 1, &out) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(find_what_is_there, cudaFuncAttributeMaxDynamicSharedMemorySize, (99 << 10) + 1) ==
        cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(find_what_is_there, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 << 10) == cudaSuccess);
  CHECK(launch(find_what_is_there, 1, 100, 99 << 10, &out) == cudaSuccess);
  CHECK(launch(find_what_is_there, 0, 100, 100, &out) == cudaErrorInvalidConfiguration);
  CHECK(launch(find_what_is_there, 1, 1025, 1025, &out) == cudaErrorInvalidConfiguration);
  CHECK(std::strlen(cudaGetErrorString(cudaErrorInvalidConfiguration)) > 0);
  emulator::settings = {};
}

// --- atomics -------------------------------------------------------------------------------------------------------

__global__ void add_up(int* sum, unsigned long long* wide, unsigned* last) {
  auto* count = reinterpret_cast<unsigned*>(shared_memory);
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  atomicAdd(count, 1u);
  atomicAdd(sum, -static_cast<int>(threadIdx.x));
  if (atomicAdd(wide, 1ull << 32) == (2ull * kThreads - 1) << 32) *last = blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0 && __ldcg(count) != blockDim.x) *last = 99;
}

TEST(atomics_add) {
  in_every_order([] {
    int sum = 0;
    unsigned long long wide = 0;
    unsigned last = 98;
    cudaMemsetAsync(&sum, 0, sizeof sum);
    launch(add_up, 2, kThreads, sizeof(unsigned), &sum, &wide, &last);
    CHECK(sum == -kThreads * (kThreads - 1) && wide == 2ull * kThreads << 32);
    if (emulator::settings.blocks != Order::kShuffled) CHECK(last == (emulator::settings.blocks == Order::kForward));
  });
}

// The last block to arrive adds up what all blocks have left: what csrc/cuda does along a response.
__global__ void last_block_sums(int* parts, unsigned* arrived, int* sum) {
  bool& last = *reinterpret_cast<bool*>(shared_memory);
  const unsigned threads = blockDim.x, blocks = gridDim.x;
  parts[blockIdx.x * threads + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  for (unsigned block = 0; block < blocks; ++block) atomicAdd(sum, parts[block * threads + threads - 1 - threadIdx.x]);
}

TEST(blocks_meet_by_an_atomic_between_fences) {
  in_every_order([] {
    std::vector<int> parts(3 * kThreads);
    unsigned arrived = 0;
    int sum = 0;
    launch(last_block_sums, 3, kThreads, 1, parts.data(), &arrived, &sum);
    CHECK(sum == 3 * kThreads);
  });
}

// --- numbers -------------------------------------------------------------------------------------------------------

TEST(numbers_are_as_in_cuda) {
  CHECK(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(0) == 0 && __ffs(8) == 4);
  CHECK(__funnelshift_r(0x11223344, 0xaabbccdd, 8) == 0xdd112233 && __funnelshift_r(1, 2, 32) == 1);
  CHECK(min(3, 5l) == 3 && max(3u, 5u) == 5 && min(2.f, NAN) == 2 && max(NAN, 2.) == 2);
}

TEST(numbers_are_as_in_ptx) {
  using namespace ptx;
  using Halves = Pair<pruneopd::Half>;
  CHECK((extreme<true, false>(NAN, 2.f) == 2 && std::isnan(extreme<true, true>(2.f, NAN)) &&
         extreme<false, false>(3, 5) == 3));
  CHECK((!std::signbit(extreme<true, true>(-0.f, 0.f)) && std::signbit(extreme<false, true>(0.f, -0.f))));
  CHECK((as<uint32_t>(extreme<true, true>(Halves::of(2, NAN), Halves::of(-1, 1))) == 0x40007fff));
  CHECK((as<uint32_t>(Pair<pruneopd::BFloat16>::of(1, -2)) == 0x3f80c000 &&
         converted<float>(pruneopd::Half{0x3c00}) == 1));
  CHECK((to_integer<int32_t>(-2.9f) == -2 && to_integer<int32_t>(3e9) == INT32_MAX &&
         to_integer<int64_t>(NAN) == INT64_MIN));
  CHECK(shifted_left(1u, 32) == 0 && shifted_right(-8, 40) == -1 && shifted_right(8u, 2) == 2);
  CHECK(insert_bits(0xffu, 0u, 4, 8) == 0xff0 && insert_bits(0ull, ~0ull, 60, 8) == ~0ull >> 4);
  CHECK(permuted_bytes(0x03020100, 0x07060584, 0x7c40) == 0x07ff8400 && reversed(6) == 0x60000000);
  CHECK((high_product(1 << 30, -4) == -1 && high_product(~0ull, 2ull) == 1 && exp2_approximately(-127) == 0));
}

__global__ void load_4(const float* from, float* to) {
  *to = ptx::address<float, 4>(reinterpret_cast<uint64_t>(from), sizeof(float) * threadIdx.x)[0];
}

TEST(misaligned_accesses_of_ptx_are_reported) {
  alignas(16) const float from[8] = {1};
  float to = 0;
  CHECK(launch(load_4, 1, 1, 0, +from, &to) == cudaSuccess && to == 1);
  CHECK(contains(error_of([&] { launch(load_4, 1, 2, 0, +from, &to); }),
                 "thread 1 of block 0: a misaligned access of 16 bytes at 0x"));
}

}  // namespace
