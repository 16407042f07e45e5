// A block of a kernel on one host thread.
//
// Each thread of the block is a fiber. A warp runs until it waits for the other warps, so a missing
// barrier gives wrong results, not only the chance of them; threads that wait for each other in
// vain are found and named. ThreadSanitizer knows fibers: to it they are threads that only barriers
// and fences order, and blocks on different host threads are ordered by nothing but fences.
#pragma once

#include <cstdint>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct float4;
struct uint4;
struct uint2;

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace shim {

// A kernel with its parameters.
struct Body {
  void (*run)(const void* call);
  const void* call;
};

// ---- what a thread does -------------------------------------------------------------------------

void block_barrier(int line);
void warp_barrier(unsigned mask, int line);
uint64_t exchange(unsigned mask, uint64_t bits, int source, int line);  // through the warp
[[noreturn]] void misaligned(const volatile void* address, int bytes);
[[noreturn]] void illegal_address(const void* address);

inline void check_aligned(const volatile void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) misaligned(address, bytes);
}

template <class T>
T exchanged(unsigned mask, T value, int source, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, line);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T, class... Among>
constexpr bool is_one_of = (std::is_same_v<T, Among> || ...);

// A device traps where x86 would not: every access has to be aligned to its own size.
template <class T>
void check_access(const T* address) {
  static_assert(is_one_of<T, float4, uint4, uint2, float, double, unsigned long long, unsigned,
                          unsigned short, unsigned char>);
  check_aligned(address, sizeof(T));
}

template <class T>
T load(const T* address) {
  check_access<T>(address);
  T value;
  __builtin_memcpy(&value, address, sizeof value);  // memory of any type
  return value;
}

#if defined(SHIM_TSAN)
// ThreadSanitizer has no fences. It is told their rule: what comes before a fence and then an
// atomic is ordered before what follows, in another block, an atomic on the same address and then a
// fence.
void before_atomic(void* address);
void after_atomic(void* address);
void device_fence();
#else
inline void before_atomic(void*) {}
inline void after_atomic(void*) {}
inline void device_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#endif

// `change` of the value at `address`, which by itself orders nothing around it, as on the device.
template <class T, class Change>
T atomic(T* address, const Change& change) {
  check_aligned(address, sizeof *address);
  before_atomic(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, change(old), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return old;
}

// ---- what a launch does -------------------------------------------------------------------------

constexpr unsigned kMaxThreads = 256;  // of a block

enum class Order { kAscending, kDescending };

struct Schedule {
  int host_threads = 0;  // that share the blocks; 0: the caller runs them one after the other
  Order blocks = Order::kAscending;
  Order threads = Order::kAscending;
};

struct Grid {
  Body body;
  unsigned blocks, threads;
  Schedule schedule;
};

enum class Outcome {
  kDone,
  kMisaligned,
  kIllegalAddress,
  kStuck
};  // a mishap is described on stderr

Outcome run_block(const Grid& grid, unsigned index);

// The outcome of one of the mishaps, if there are any.
Outcome run_grid(const Grid& grid);

}  // namespace shim
