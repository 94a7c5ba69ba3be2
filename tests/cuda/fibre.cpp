#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

// The emulator itself is not instrumented, so the compiler's macros do not tell which sanitizer is there.
#ifdef EMULATOR_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATOR_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace emulator {
namespace {

// Frames are larger under the sanitizers; untouched pages cost nothing.
constexpr size_t kStackBytes = 256 << 10;

/// Who is being switched to, and from, for whoever runs next.
Fibre* arriving;
Fibre* leaving;

#ifdef __x86_64__
// swapcontext would save the signal mask with a system call, and AddressSanitizer forgets all it knows of a stack
// there.
extern "C" void emulator_swap_stacks(void** from, void* to);
asm(R"(
.text
.type emulator_swap_stacks, @function
emulator_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_swap_stacks, .-emulator_swap_stacks
)");
#endif

}  // namespace

Fibre::Fibre() {
#ifdef EMULATOR_THREAD_SANITIZER
  thread_ = __tsan_get_current_fiber();
#endif
}

Fibre::Fibre(void (*body)()) : body_(body), size_(kStackBytes) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, guard + size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, guard, PROT_NONE);
  bottom_ = memory_ + guard;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(memory_ + guard + size_);
  top[-2] = reinterpret_cast<void*>(&Fibre::start);  // where the switch returns to, below it six registers
  stack_pointer_ = top - 8;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_ + guard;
  context_.uc_stack.ss_size = size_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fibre::start, 0);
#endif
#ifdef EMULATOR_THREAD_SANITIZER
  thread_ = __tsan_create_fiber(0);
#endif
}

Fibre::~Fibre() {
  if (!memory_) return;
#ifdef EMULATOR_THREAD_SANITIZER
  // By way of two switches all that the fibre has done comes before this.
  void* here = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread_, 0);
  __tsan_switch_to_fiber(here, 0);
  __tsan_destroy_fiber(thread_);
#endif
  allow(bottom_, size_);
  munmap(memory_, static_cast<size_t>(static_cast<const char*>(bottom_) - memory_) + size_);
}

void Fibre::switch_from(Fibre& current) {
  arriving = this;
  leaving = &current;
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&current.fake_stack_, bottom_, size_);
#endif
#ifdef __x86_64__
  emulator_swap_stacks(&current.stack_pointer_, stack_pointer_);
#else
  swapcontext(&current.context_, &context_);
#endif
  // It is current's turn again.
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(current.fake_stack_, &leaving->bottom_, &leaving->size_);
#endif
}

void Fibre::start() {
#ifdef EMULATOR_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &leaving->bottom_, &leaving->size_);
#endif
  arriving->body_();
  std::abort();
}

void release([[maybe_unused]] const void* tag) {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_release(const_cast<void*>(tag));
#endif
}

void acquire([[maybe_unused]] const void* tag) {
#ifdef EMULATOR_THREAD_SANITIZER
  __tsan_acquire(const_cast<void*>(tag));
#endif
}

void renew_pages([[maybe_unused]] void* pages, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_THREAD_SANITIZER
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
}

void forbid([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_poison_memory_region(memory, bytes);
#endif
}

void allow([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace emulator
