// Stacks to switch between, and what the sanitizers are to know of it. Included by files that are
// compiled without instrumentation: SHIM_ASAN or SHIM_TSAN says what kernels are compiled with.
#pragma once

#include <ucontext.h>

#include <cstddef>

#if defined(SHIM_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SHIM_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace shim {

// ---- what ThreadSanitizer hears -----------------------------------------------------------------

// What comes before release(x) in one thread is ordered before what follows acquire(x) in another.
inline void release([[maybe_unused]] void* what) {
#if defined(SHIM_TSAN)
  __tsan_release(what);
#endif
}

inline void acquire([[maybe_unused]] void* what) {
#if defined(SHIM_TSAN)
  __tsan_acquire(what);
#endif
}

extern char before_launch, after_launch;  // every launch of the process

// ---- contexts -----------------------------------------------------------------------------------

struct Context {
  void* point[5];  // where it goes on
  ucontext_t start;
  bool started = false;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // its name for this context
};

// A jump instead of swapcontext, which asks the system each time. The compiler's own, because the
// library's is for the way back on one stack, and sanitizers take it for that.
__attribute__((noinline)) inline void jump(Context& to) {
  if (to.started) __builtin_longjmp(to.point, 1);
  to.started = true;
  setcontext(&to.start);
}

__attribute__((noinline)) inline void switch_context(Context& from, Context& to) {
#if defined(SHIM_TSAN)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#endif
  if (__builtin_setjmp(from.point) == 0) jump(to);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

}  // namespace shim
