// The host side of the fake runtime, and what tests do with it: count, inject failures, and shape
// the device (the extern "C" functions, called through ctypes by __init__.py).
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace {

struct Launch {
  int64_t kernel;  // its address in this library's file
  int64_t stream;
  int32_t blocks, device;
};

struct Pages {
  void* first;
  size_t bytes;
};

struct Runtime {
  std::map<std::string, int> calls;  // "": all together
  std::map<std::string, int> settings;
  std::vector<Launch> launches;
  std::vector<Pages> guarded;  // that only kernels may touch
  std::string failing;         // the function whose call fails; "": any
  int calls_to_failure = 0;    // 1: the next; 0: none fails
  cudaError_t failure = cudaSuccess;
  cudaError_t last_error = cudaSuccess;
  int device = 0;
};

Runtime& runtime() {
  static Runtime& it = *new Runtime;
  return it;
}

// ThreadSanitizer can judge what orders the blocks only if they run side by side.
#if defined(SHIM_TSAN)
constexpr int kHostThreads = 4;
#else
constexpr int kHostThreads = 0;
#endif

int setting(const char* name) {
  static const std::map<std::string, int> defaults = {
      {"devices", 1},
      {"processors", 2},
      {"blocks_per_processor", 2},
      {"driver", 13000},
      {"runtime", 13000},
      {"host_threads", kHostThreads},
      {"blocks_descending", 0},
      {"threads_descending", 0},
      {"late_errors", 0}};  // 1: a launch that fails runs, and reports the error of an earlier one
  const auto& own = runtime().settings;
  const auto found = own.find(name);
  return found != own.end() ? found->second : defaults.at(name);
}

cudaError_t failed(cudaError_t error) {
  runtime().last_error = error;
  return error;
}

// Counts a call and says whether it is to fail.
cudaError_t entered(const char* function) {
  Runtime& r = runtime();
  ++r.calls[function];
  ++r.calls[""];
  if (r.calls_to_failure > 0 && (r.failing.empty() || r.failing == function) &&
      --r.calls_to_failure == 0) {
    return failed(r.failure);
  }
  if (setting("devices") == 0) return failed(cudaErrorNoDevice);
  return cudaSuccess;
}

void protect_guarded(int protection) {
  for (const Pages& pages : runtime().guarded) mprotect(pages.first, pages.bytes, protection);
}

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};

// As the CUDA runtime words them.
const ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
};

const ErrorText& text_of(cudaError_t error) {
  static const ErrorText unknown = {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  for (const ErrorText& entry : kErrors) {
    if (entry.error == error) return entry;
  }
  return unknown;
}

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  if (const cudaError_t error = entered(__func__)) return error;
  *count = setting("devices");
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = entered(__func__)) return error;
  *device = runtime().device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = entered(__func__)) return error;
  if (device < 0 || device >= setting("devices")) return failed(cudaErrorInvalidDevice);
  runtime().device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = entered(__func__)) return error;
  if (device < 0 || device >= setting("devices")) return failed(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrMultiProcessorCount      ? setting("processors")
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  if (const cudaError_t error = entered(__func__)) return error;
  *version = setting("driver");
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  if (const cudaError_t error = entered(__func__)) return error;
  *version = setting("runtime");
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t injected = entered(__func__);
  const cudaError_t error = injected ? injected : runtime().last_error;
  runtime().last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }

cudaError_t shim::max_active_blocks(int* blocks, int block_size) {
  if (const cudaError_t error = entered("cudaOccupancyMaxActiveBlocksPerMultiprocessor")) {
    return error;
  }
  if (block_size <= 0) return failed(cudaErrorInvalidValue);
  *blocks = setting("blocks_per_processor");
  return cudaSuccess;
}

cudaError_t shim::launch(const cudaLaunchConfig_t& config, const void* kernel, size_t param_bytes,
                         const Body& body) {
  const cudaError_t error = entered("cudaLaunchKernelEx");
  if (error != cudaSuccess && !setting("late_errors")) return error;
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || grid.x == 0 || grid.x > 0x7fffffffu || block.x == 0 || block.x > kMaxThreads ||
      config.dynamicSmemBytes != 0 || config.numAttrs != 0 || param_bytes > 4096) {
    std::fprintf(stderr,
                 "cuda shim: a launch of %u blocks of %u threads with %zu bytes of parameters\n",
                 grid.x, block.x, param_bytes);
    return failed(cudaErrorInvalidConfiguration);
  }
  Dl_info library = {};
  dladdr(kernel, &library);
  runtime().launches.push_back(
      {static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase),
       reinterpret_cast<int64_t>(config.stream), static_cast<int32_t>(grid.x), runtime().device});
  Schedule schedule;
  schedule.host_threads = setting("host_threads");
  if (setting("blocks_descending")) schedule.blocks = Order::kDescending;
  if (setting("threads_descending")) schedule.threads = Order::kDescending;
  protect_guarded(PROT_READ | PROT_WRITE);
  const Outcome outcome = run_grid({body, grid.x, block.x, schedule});
  protect_guarded(PROT_NONE);
  switch (outcome) {
    case Outcome::kMisaligned:
      return failed(cudaErrorMisalignedAddress);
    case Outcome::kIllegalAddress:
      return failed(cudaErrorIllegalAddress);
    case Outcome::kStuck:
      return failed(cudaErrorLaunchFailure);
    default:
      return error;
  }
}

#define SHIM_API extern "C" __attribute__((visibility("default")))

SHIM_API void shim_reset() {
  protect_guarded(PROT_READ | PROT_WRITE);
  runtime() = Runtime();
}

// From now on these whole pages are memory of the device: the host that touches them is killed.
SHIM_API void shim_guard(void* first, size_t bytes) {
  runtime().guarded.push_back({first, bytes});
  protect_guarded(PROT_NONE);
}

SHIM_API void shim_set(const char* name, int value) { runtime().settings[name] = value; }

// The call number `count` from now of `function`, or of any if that is "", fails with `error`.
SHIM_API void shim_fail(const char* function, int count, int error) {
  runtime().failing = function;
  runtime().calls_to_failure = count;
  runtime().failure = static_cast<cudaError_t>(error);
}

SHIM_API int shim_calls(const char* function) { return runtime().calls[function]; }

SHIM_API int shim_last_error() { return runtime().last_error; }

SHIM_API int shim_current_device() { return runtime().device; }

SHIM_API void shim_make_current(int device) { runtime().device = device; }

SHIM_API int shim_launches(Launch* launches, int room) {
  const auto& all = runtime().launches;
  std::copy_n(all.begin(), std::min<size_t>(all.size(), static_cast<size_t>(room)), launches);
  return static_cast<int>(all.size());
}
