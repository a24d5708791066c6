// Switching between stacks, by hand on x86-64 (a few nanoseconds), by ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace lminf::emulation {

#if defined(__x86_64__)

struct FiberPoint {
  void* stack = nullptr;
};

// Saves the registers a call must keep, the stack pointer last, and takes up the other's.
extern "C" void lminfSwitchStack(void** from, void* to);
asm(R"(
.text
.type lminfSwitchStack, @function
lminfSwitchStack:
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
.size lminfSwitchStack, .-lminfSwitchStack
)");

inline void switchFiber(FiberPoint& from, const FiberPoint& to) {
  lminfSwitchStack(&from.stack, to.stack);
}

struct Fiber {
  FiberPoint point;
  std::unique_ptr<unsigned char[]> stack;
  std::size_t bytes = 0;

  void allocate(std::size_t size) {
    stack.reset(new unsigned char[size]);
    bytes = size;
  }

  // The first switch returns into `main`, with the stack as a call would leave it.
  void start(void (*main)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack.get() + bytes) & ~std::uintptr_t{15};
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // main's return address: it never returns
    *--slot = reinterpret_cast<void*>(main);
    for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
    point.stack = slot;
  }
};

#else

struct FiberPoint {
  ucontext_t context;
};

inline void switchFiber(FiberPoint& from, const FiberPoint& to) {
  swapcontext(&from.context, &to.context);
}

struct Fiber {
  FiberPoint point;
  std::unique_ptr<unsigned char[]> stack;
  std::size_t bytes = 0;

  void allocate(std::size_t size) {
    stack.reset(new unsigned char[size]);
    bytes = size;
  }

  void start(void (*main)()) {
    getcontext(&point.context);
    point.context.uc_stack.ss_sp = stack.get();
    point.context.uc_stack.ss_size = bytes;
    point.context.uc_link = nullptr;
    makecontext(&point.context, main, 0);
  }
};

#endif

}  // namespace lminf::emulation
