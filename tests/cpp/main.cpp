// Runs every test, or those whose name contains the first argument.
#include <cstring>

#include "harness.h"

int main(int argc, char** argv) {
  int run = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    const int before = failures();
    test.run();
    std::printf("%s  %s\n", failures() == before ? "ok    " : "FAILED", test.name);
    std::fflush(stdout);
    ++run;
  }
  std::printf("%d C++ tests, %d failed checks\n", run, failures());
  return failures() || !run;
}
