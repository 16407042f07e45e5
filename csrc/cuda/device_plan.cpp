#include "device_plan.h"

#include <cstring>
#include <string>

#include "../check.h"
#include "launch.h"

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

// The three parts of the table of inputs, each on a 16-byte boundary.
struct InputsLayout {
  size_t device_numbers, grads, bytes;

  explicit InputsLayout(const DeviceTables& t) {
    const auto groups = static_cast<size_t>(t.n_groups);
    device_numbers = kOptionsBytes * groups;
    grads = device_numbers + kDeviceNumbers * sizeof(DeviceNumber) * groups;
    bytes = grads + sizeof(Grad) * static_cast<size_t>(t.n_rows);
  }
};

}  // namespace

DevicePlan::DevicePlan(const DeviceTables& tables, Rule rule, bool amsgrad)
    : tables_(tables), rule_(rule), amsgrad_(amsgrad) {
  FUSEDOPT_CHECK(tables.n_chunks < INT32_MAX, tables.n_chunks,
                 " chunks are more than an int counts");
  const DeviceGuard guard(tables.device);
  check(resident_blocks(rule, amsgrad, &reduce_blocks_, &update_blocks_), "resident_blocks");
  FUSEDOPT_CHECK(reduce_blocks_ > 0 && update_blocks_ > 0, "this GPU cannot hold one block");
}

void DevicePlan::begin(const StepArguments& arguments, cudaStream_t stream, bool capturing) {
  const InputsLayout layout(tables_);
  auto* inputs = static_cast<char*>(tables_.inputs);
  step_.plan = {tables_.rows,       reinterpret_cast<const Grad*>(inputs + layout.grads),
                tables_.row_steps,  tables_.n_rows,
                tables_.chunks,     tables_.n_chunks,
                tables_.n_elements, tables_.partials};
  step_.rule = rule_;
  step_.n_device_numbers = arguments.n_device_numbers;
  step_.group_options = inputs;
  step_.device_numbers = reinterpret_cast<const DeviceNumber*>(inputs + layout.device_numbers);
  step_.step_options = arguments.options;
  step_.grad_scale = arguments.grad_scale;
  step_.found_inf = arguments.found_inf;
  step_.inf_flag = arguments.inf_flag;
  step_.scalars = arguments.scalars;
  step_.totals = tables_.totals;
  step_.n_totals = tables_.n_totals;
  step_.own_total = tables_.own_total;
  step_.ticket = tables_.ticket;
  step_.max_grad_value = arguments.max_grad_value;
  stream_ = stream;

  captured_ = captured_ || capturing;
  write_inputs(layout.bytes);
}

void DevicePlan::write_inputs(size_t bytes) {
  written_.resize(bytes);
  known_.resize((bytes + kPayloadBytes - 1) / kPayloadBytes);
  const auto* source = static_cast<const char*>(tables_.host_inputs);
  for (size_t page = 0; page < known_.size(); ++page) {
    const size_t at = page * kPayloadBytes;
    const size_t n = bytes - at < kPayloadBytes ? bytes - at : kPayloadBytes;
    const bool same = std::memcmp(&written_[at], source + at, n) == 0;
    if (known_[page] && same && !captured_) continue;
    known_[page] = false;
    const DeviceGuard guard(tables_.device);
    auto* inputs = static_cast<char*>(tables_.inputs);
    check(write_page(inputs + at, source + at, n, stream_), "launch of write_page");
    std::memcpy(&written_[at], source + at, n);
    known_[page] = true;
  }
}

void DevicePlan::reduce(bool finalizes) {
  const DeviceGuard guard(tables_.device);
  check(fusedopt::reduce(step_, finalizes, reduce_blocks_, stream_), "launch of reduce");
}

void DevicePlan::finalize() {
  const DeviceGuard guard(tables_.device);
  check(fusedopt::finalize(step_, stream_), "launch of finalize");
}

void DevicePlan::update() {
  const DeviceGuard guard(tables_.device);
  check(fusedopt::update(step_, amsgrad_, update_blocks_, stream_), "launch of update");
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
