// A test is a function that registers itself; a failed check says where and what, and the run goes on.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

template <class... Parts>
void report(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  if (++failures() <= 20) std::fprintf(stderr, "  %s\n", line.str().c_str());
}

#define TEST(name)                           \
  static void name();                        \
  static const bool name##_registered = [] { \
    tests().push_back({#name, name});        \
    return true;                             \
  }();                                       \
  static void name()

#define CHECK(condition) \
  if (!(condition)) report(__FILE__, ":", __LINE__, ": not true: ", #condition)

inline bool close(double got, double want, double tolerance) {
  if (std::isnan(want) || std::isinf(want)) return std::isnan(want) ? std::isnan(got) : got == want;
  return std::abs(got - want) <= tolerance * std::fmax(1, std::abs(want));
}
