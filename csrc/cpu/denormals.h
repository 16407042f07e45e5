// The kernels keep denormals, whatever the thread's flags. torch.set_flush_denormal() sets them for
// the calling thread alone: the threads of one step would compute different bits.
//
// Included by kernels.cpp, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include <cstdint>

namespace fusedopt {
namespace {

#if defined(__SSE2__)
constexpr unsigned kFlush = 0x8040;  // of MXCSR: FTZ for results, DAZ for inputs
inline unsigned float_flags() { return __builtin_ia32_stmxcsr(); }
inline void set_float_flags(unsigned flags) { __builtin_ia32_ldmxcsr(flags); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = 1u << 24;  // FZ of FPCR
inline uint64_t float_flags() {
  uint64_t flags;
  asm volatile("mrs %0, fpcr" : "=r"(flags));
  return flags;
}
inline void set_float_flags(uint64_t flags) { asm volatile("msr fpcr, %0" ::"r"(flags)); }
#else
constexpr unsigned kFlush = 0;
inline unsigned float_flags() { return 0; }
inline void set_float_flags(unsigned) {}
#endif

// Keeps denormals on the calling thread until the destructor runs.
class DenormalsKept {
 public:
  DenormalsKept() : saved_(float_flags()) {
    if (saved_ & kFlush) set_float_flags(saved_ & ~kFlush);
  }
  ~DenormalsKept() {
    if (saved_ & kFlush) set_float_flags(saved_);
  }
  DenormalsKept(const DenormalsKept&) = delete;
  DenormalsKept& operator=(const DenormalsKept&) = delete;

 private:
  const decltype(float_flags()) saved_;
};

}  // namespace
}  // namespace fusedopt
