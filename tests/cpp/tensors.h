// Tensors between two guard pages: a read or write beyond either end crashes, even in masked vector instructions, which
// AddressSanitizer does not see.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "operators/guard.h"

using namespace pruneopd;

inline size_t item_size(Scalar type) {
  static constexpr size_t kSizes[] = {1, 1, 1, 2, 4, 8, 2, 2, 4, 8};
  return kSizes[static_cast<size_t>(type)];
}

/// The bits of a number in a narrower type, rounded to nearest even from float32.
inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_bits(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::abs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [0.5, 1): its first bit adds one to the exponent
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + std::nearbyint(fraction * 2048));
}

/// Values of one type at the given strides (in elements, of either sign), and the view of them whose last axis is
/// either a row or one more axis of positions.
class Tensor {
 public:
  Tensor(Scalar type, Shape shape, Shape strides, const std::vector<double>& values, bool rows)
      : type_(type), shape_(shape), strides_(strides) {
    int64_t lowest = 0, highest = 0, count = 1;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      count *= shape[axis];
      (strides[axis] < 0 ? lowest : highest) += (shape[axis] - 1) * strides[axis];
    }
    if (count == 0) lowest = highest = 0;
    const size_t item = item_size(type), bytes = count ? static_cast<size_t>(highest - lowest + 1) * item : 0;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page;
    const size_t size = (pages + 2) * page;
    char* base = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base, page, PROT_NONE);
    mprotect(base + (pages + 1) * page, page, PROT_NONE);
    memory_ = std::shared_ptr<char>(base, [size](char* p) { munmap(p, size); });
    // Gaps between elements hold NaN, an id out of range, or a true flag.
    std::memset(base + page, 0xff, pages * page);
    // Against the far page, because vector loops overrun that end.
    data_ = base + (pages + 1) * page - bytes - static_cast<int64_t>(item) * lowest;

    const size_t axes = shape.size() - (rows ? 1 : 0);
    view = {data_, type, Positions(shape.data(), strides.data(), static_cast<int64_t>(axes)),
            rows ? strides.back() : 1};
    for (int64_t n = 0; n < count; ++n) {
      int64_t at = 0, rest = n;
      for (size_t axis = shape.size(); axis-- > 0; rest /= shape[axis]) at += rest % shape[axis] * strides[axis];
      store(at, values[static_cast<size_t>(n)]);
    }
  }

  /// Returns it as a caller's tensor.
  Array array() const {
    static constexpr const char* kNames[] = {"bool",  "uint8",   "int8",     "int16",   "int32",
                                             "int64", "float16", "bfloat16", "float32", "float64"};
    return {data_, kNames[static_cast<size_t>(type_)], "cpu", shape_, strides_};
  }
  char* data() const { return data_; }

  View view;

 private:
  void store(int64_t at, double x) {
    char* to = data_ + at * static_cast<int64_t>(item_size(type_));
    const auto put = [&](auto value) { std::memcpy(to, &value, sizeof value); };
    switch (type_) {
      case Scalar::kBool: return put(static_cast<uint8_t>(x != 0));
      case Scalar::kU8: return put(static_cast<uint8_t>(x));
      case Scalar::kI8: return put(static_cast<int8_t>(x));
      case Scalar::kI16: return put(static_cast<int16_t>(x));
      case Scalar::kI32: return put(static_cast<int32_t>(x));
      case Scalar::kI64: return put(static_cast<int64_t>(x));
      case Scalar::kF16: return put(half_bits(static_cast<float>(x)));
      case Scalar::kBF16: return put(bfloat16_bits(static_cast<float>(x)));
      case Scalar::kF32: return put(static_cast<float>(x));
      case Scalar::kF64: return put(x);
    }
  }

  Scalar type_;
  Shape shape_, strides_;
  std::shared_ptr<char> memory_;
  char* data_;
};

inline Shape contiguous(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  return strides;
}

/// Threads for `share_out`.
inline void start_threads(int64_t workers, const std::function<void()>& worker) {
  std::vector<std::jthread> threads;
  for (int64_t n = 0; n < workers; ++n) threads.emplace_back(worker);
}

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}

  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
  double normal() { return std::normal_distribution<>()(engine); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine); }
  template <class T>
  T pick(const std::vector<T>& of) {
    return of[static_cast<size_t>(integer(0, static_cast<int64_t>(of.size()) - 1))];
  }
};

/// One value per position, or with `rows` a row of them along the last axis: at strides of any kind and sign, or with
/// `adjacent` side by side within a row.
inline Tensor make_tensor(Random& random, Scalar type, const Shape& shape, bool rows,
                          const std::function<double()>& value, bool adjacent = false) {
  std::vector<double> numbers(static_cast<size_t>(count(shape)));
  for (double& number : numbers) number = value();
  Shape strides = contiguous(shape);
  if (!adjacent && !shape.empty() && random.chance(.3)) strides.back() = random.pick<int64_t>({2, -1});
  for (size_t axis = shape.size(); axis-- > 1;)
    strides[axis - 1] = (std::abs(strides[axis]) * shape[axis] + random.integer(0, 3)) * (random.chance(.2) ? -1 : 1);
  return Tensor(type, shape, strides, numbers, rows);
}
