#include "device_plan.h"

#include <cstring>

#include "../check.h"

namespace fusedopt {
namespace {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call to look would report it once more
  fail("CUDA: ", call, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Makes a device current and the caller's current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    moved_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool moved_ = false;
};

constexpr size_t kRecord = sizeof(StepRecord);  // travels by value, and comes first in the table

}  // namespace

DevicePlan::DevicePlan(int device, const Inputs& inputs, const DeviceStep& step)
    : device_(device),
      inputs_(inputs),
      step_(step),
      written_(inputs.bytes),
      known_((inputs.bytes - kRecord + kPayloadBytes - 1) / kPayloadBytes) {
  const DeviceGuard guard(device);
  check(resident_blocks(step, &reduce_blocks_, &update_blocks_), "resident_blocks");
  FUSEDOPT_CHECK(reduce_blocks_ > 0 && update_blocks_ > 0, "this GPU cannot hold one block");
}

void DevicePlan::begin(cudaStream_t stream, bool capturing) {
  step_.record = *inputs_.host;
  stream_ = stream;
  captured_ = captured_ || capturing;
  const auto* source = reinterpret_cast<const char*>(inputs_.host);
  for (size_t page = 0; page < known_.size(); ++page) {
    const size_t at = kRecord + page * kPayloadBytes;
    const size_t n = inputs_.bytes - at < kPayloadBytes ? inputs_.bytes - at : kPayloadBytes;
    const bool same = std::memcmp(&written_[at], source + at, n) == 0;
    if (known_[page] && same && !captured_) continue;
    known_[page] = false;
    const DeviceGuard guard(device_);
    auto* destination = static_cast<char*>(inputs_.device) + at;
    check(write_page(destination, source + at, n, stream), "launch of write_page");
    std::memcpy(&written_[at], source + at, n);
    known_[page] = true;
  }
}

void DevicePlan::reduce(bool finalizes) {
  const DeviceGuard guard(device_);
  check(fusedopt::reduce(step_, finalizes, reduce_blocks_, stream_), "launch of reduce");
}

void DevicePlan::finalize() {
  const DeviceGuard guard(device_);
  check(fusedopt::finalize(step_, stream_), "launch of finalize");
}

void DevicePlan::update() {
  const DeviceGuard guard(device_);
  check(fusedopt::update(step_, update_blocks_, stream_), "launch of update");
  ++updates_;
}

int device_count() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver == 0) fail("CUDA: there is no NVIDIA driver");
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

}  // namespace fusedopt
