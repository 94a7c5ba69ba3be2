// How positions are shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace pruneopd {

/// Runs body(begin, end) over [0, count) on up to `threads` workers. They take blocks of at least `grain` from one
/// counter: masked positions cost nothing, so equal shares would leave workers idle. `start(workers, worker)` runs
/// worker() that many times, on as many threads as it has. An exception stops the rest and is thrown here, not in a
/// thread of a pool.
template <class Start>
void share_out(int64_t count, int64_t grain, int64_t threads, const std::function<void(int64_t, int64_t)>& body,
               const Start& start) {
  constexpr int64_t kBlocksPerWorker = 16;
  grain = std::max<int64_t>(grain, 1);
  const int64_t workers = std::min(threads, (count + grain - 1) / grain);
  if (workers <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  const int64_t block = std::max(grain, count / (workers * kBlocksPerWorker));
  std::atomic<int64_t> next = 0;
  std::exception_ptr error;
  std::mutex error_lock;
  start(workers, [&] {
    try {
      for (int64_t begin; (begin = next.fetch_add(block)) < count;) body(begin, std::min(begin + block, count));
    } catch (...) {
      next = count;
      const std::lock_guard lock(error_lock);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace pruneopd
