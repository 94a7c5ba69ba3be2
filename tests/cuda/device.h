// The emulated device as the random cases see it: which settings they run by, and memory.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpp/harness.h"
#include "cuda/operators.h"
#include "emulator.h"

using emulator::Order;

/// Widths at which rows are cut into units, which several blocks may share.
inline const std::vector<int64_t> kWideWidths = {16383, 16384, 16385, 33000, 50000};

/// Threads, blocks, seed, multiprocessors: rows are split over many blocks, over none, over some.
inline const std::vector<emulator::Settings> kSettings = {
    {Order::kForward, Order::kForward, 0, 132},
    {Order::kBackward, Order::kBackward, 0, 1},
    {Order::kShuffled, Order::kShuffled, 1, 5},
};

/// The settings of case n and the number of cases: ThreadSanitizer asks for no particular order, and takes its time.
inline std::vector<emulator::Settings> settings_of(int n) {
  if (!emulator::kFindsRaces) return kSettings;
  return {kSettings[static_cast<size_t>(n) % kSettings.size()]};
}
inline int some(int cases) { return emulator::kFindsRaces ? cases / 5 : cases; }

/// Memory of the device lives as long as the queue, and holds garbage at first.
template <class Args>
void compute(const Args& args) {
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  pruneopd::cuda::compute(args, {nullptr, 0, [&](int64_t bytes) -> void* {
                                   memory.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
                                   std::memset(memory.back().get(), 0xa5, static_cast<size_t>(bytes));
                                   return memory.back().get();
                                 }});
}

template <class T>
void check_bits(const std::string& where, const char* output, const std::vector<T>& got, const std::vector<T>& want) {
  for (size_t n = 0; n < want.size(); ++n)
    if (std::memcmp(&got[n], &want[n], sizeof(T)) != 0) {
      report(where, ": ", output, "[", n, "] is ", +got[n], " in one order and ", +want[n], " in another");
      return;
    }
}
