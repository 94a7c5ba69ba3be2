// How the tests share out an operator's work.
#pragma once

#include <thread>
#include <vector>

#include "bindings/parallel.h"
#include "cpu/operators.h"

inline const pruneopd::ParallelFor kOneThread =
    [](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) { body(0, count); };

inline const pruneopd::ParallelFor kThreeThreads = [](int64_t count, int64_t grain,
                                                      const std::function<void(int64_t, int64_t)>& body) {
  pruneopd::bindings::share_out(count, grain, 3, body, [](int64_t workers, const auto& worker) {
    std::vector<std::jthread> threads;
    for (int64_t n = 0; n < workers; ++n) threads.emplace_back(worker);
  });
};
