// Fibers: stacks that a scheduler switches between, known to AddressSanitizer.
#pragma once

#if !defined(__x86_64__)
#error "the fibers of the emulator are written for x86-64"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace simt {

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
simt_switch:
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
)");

inline constexpr size_t kStackBytes = 256 << 10;

// The side of a switch that AddressSanitizer wants to know.
struct StackBounds {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

inline void announce_switch([[maybe_unused]] const StackBounds& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, to.bottom, to.bytes);
#endif
}
inline void finish_switch([[maybe_unused]] StackBounds* from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, from ? &from->bottom : nullptr,
                                  from ? &from->bytes : nullptr);
#endif
}

class Fiber {
 public:
  Fiber() : stack_(static_cast<uint8_t*>(std::aligned_alloc(64, kStackBytes))) {}

  // `entry` never returns.
  void start(void (*entry)()) {
    uint8_t* end = stack_.get() + kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
    // The frames that the last run never returned from; those below have cleaned up themselves.
    if (pointer_ != nullptr) {
      auto* last = static_cast<uint8_t*>(pointer_);
      ASAN_UNPOISON_MEMORY_REGION(last, static_cast<size_t>(end - last));
    }
#endif
    void** top = reinterpret_cast<void**>(end - 64);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // callee-saved registers
    pointer_ = top;
  }
  // From the scheduler into the fiber, and back.
  void enter() {
    announce_switch({stack_.get(), kStackBytes});
    simt_switch(&scheduler_, pointer_);
    finish_switch(nullptr);
  }
  void leave() {
    announce_switch(scheduler_bounds_);
    simt_switch(&pointer_, scheduler_);
    finish_switch(&scheduler_bounds_);
  }
  static void arrived() { finish_switch(&scheduler_bounds_); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> stack_;
  void* pointer_ = nullptr;
  inline static void* scheduler_ = nullptr;
  inline static StackBounds scheduler_bounds_;
};

}  // namespace simt
