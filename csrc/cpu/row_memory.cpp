#include <algorithm>

#include "row_pass.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace pruneopd {

RowMemory::RowMemory(int64_t vocab_size, int64_t k) {
  const int64_t tiles = (vocab_size + kTile - 1) / kTile;
  const int64_t capacity = 2 * k + 2 * kTile;  // a tile more than what makes select() keep the best
  const int64_t room = std::min(capacity, vocab_size);
  tile_max_ = std::make_unique_for_overwrite<float[]>(2 * tiles);
  integers_ = std::make_unique_for_overwrite<uint64_t[]>(tiles + 2 * room);
  uint64_t* const integers = integers_.get();
  scratch_ = {tile_max_.get(), tile_max_.get() + tiles, integers, integers + tiles, integers + tiles + room, capacity};
}

#if defined(__x86_64__) || defined(__i386__)

FloatMode::FloatMode(bool flush_results) : saved_(_mm_getcsr()) {
  constexpr uint32_t kFlushResults = 0x8000, kSubnormalsAreZero = 0x0040;
  const uint32_t others = static_cast<uint32_t>(saved_) & ~(kFlushResults | kSubnormalsAreZero);
  _mm_setcsr(flush_results ? others | kFlushResults : others);
}
FloatMode::~FloatMode() { _mm_setcsr(static_cast<uint32_t>(saved_)); }

#elif defined(__aarch64__)

// One bit flushes inputs and results alike, so it is cleared: subnormal results cost nothing extra on most of these
// cores.
FloatMode::FloatMode(bool) {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(saved_ & ~(uint64_t{1} << 24)));
}
FloatMode::~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

#else

FloatMode::FloatMode(bool) : saved_(0) {}
FloatMode::~FloatMode() = default;

#endif

}  // namespace pruneopd
