// Fibres: threads of execution that take turns by themselves, each with a stack of its own. The sanitizers are told of
// every switch.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

class Fibre {
 public:
  /// What is running already.
  Fibre();
  /// One that will run `body`, which never returns. A fibre may be dropped while it waits for its turn.
  explicit Fibre(void (*body)());
  ~Fibre();
  Fibre(const Fibre&) = delete;

  /// Runs this one until it switches back. For ThreadSanitizer a switch orders nothing.
  void switch_from(Fibre& current);

 private:
  static void start();

  void (*body_)() = nullptr;
  char* memory_ = nullptr;
  const void* bottom_ = nullptr;  // of the stack, and its size
  size_t size_ = 0;
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* thread_ = nullptr;      // ThreadSanitizer's
};

/// Under ThreadSanitizer: everything before release(tag) comes before what follows acquire(tag).
void release(const void* tag);
void acquire(const void* tag);
/// Under ThreadSanitizer: whole pages are as if nobody had ever touched them, and zero.
void renew_pages(void* pages, size_t bytes);
/// Under AddressSanitizer: whether memory may be touched.
void forbid(const void* memory, size_t bytes);
void allow(const void* memory, size_t bytes);

}  // namespace emulator
