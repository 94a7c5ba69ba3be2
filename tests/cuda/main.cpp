// Runs every test, or the one that --only names; --fences lists those that each reaches, --without takes one away.
#include <chrono>
#include <stdexcept>

#include "../cpp/harness.h"
#include "emulator.h"

int main(int argc, char** argv) {
  std::string only;
  bool list = false;
  for (int n = 1; n < argc; ++n) {
    const std::string option = argv[n];
    if (option == "--only" && n + 1 < argc)
      only = argv[++n];
    else if (option == "--without" && n + 1 < argc)
      emulator::ignored_fence = argv[++n];
    else if (option == "--fences")
      list = true;
    else
      return std::fprintf(stderr, "unknown: %s\n", argv[n]), 2;
  }
  int run = 0;
  for (const Test& test : tests()) {
    if (!only.empty() && only != test.name) continue;
    const int before = failures();
    const auto start = std::chrono::steady_clock::now();
    try {
      test.run();
    } catch (const std::exception& error) {
      report(error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %5.1f s  %s\n", failures() == before ? "ok    " : "FAILED", seconds.count(), test.name);
    for (const std::string& fence : emulator::take_fences())
      if (list) std::printf("%s reaches %s\n", test.name, fence.c_str());
    std::fflush(stdout);
    ++run;
  }
  std::printf("%d tests, %d failed checks\n", run, failures());
  return failures() || !run;
}
