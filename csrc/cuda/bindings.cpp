// The pybind11 bindings of fusedopt._cuda. Plans take addresses and numbers, and throw errors.
#include "../bindings.h"

#include <cstring>
#include <vector>

#include "launch.h"

#if !defined(FUSEDOPT_CUDA_MODULE)
#define FUSEDOPT_CUDA_MODULE _cuda
#endif

namespace fusedopt {
namespace {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or the next check would report it again
  fail("CUDA: ", call, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Makes a device current; the destructor makes the caller's device current again.
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

// Everything except the record, which begin() fills in.
DeviceStep device_step(const std::string& rule, const py::dict& tables) {
  const DeviceStep step = {plan_view(tables),
                           {},
                           required<double>(tables, "options"),
                           required<const DeviceNumber>(tables, "numbers"),
                           required<Word>(tables, "sums"),
                           required<Word>(tables, "words"),
                           required<uint32_t>(tables, "ticket"),
                           count_of(tables, "n_devices"),
                           count_of(tables, "own_number"),
                           rule_named(rule),
                           count_of(tables, "n_states"),
                           tables["coded"].cast<bool>()};
  FUSEDOPT_CHECK(step.own_number < step.n_devices, "own_number lies outside of words");
  return step;
}

constexpr size_t kRecord = sizeof(StepRecord);  // first in the table of inputs; passed by value

// The verbs over the tables of a plan on one device. Every method throws std::runtime_error with
// CUDA's message; an error leaves the plan usable.
class Plan {
 public:
  Plan(const std::string& rule, const py::dict& tables)
      : device_(count_of(tables, "device")),
        host_inputs_(required<const char>(tables, "host_inputs")),
        inputs_(required<char>(tables, "inputs")),
        written_(static_cast<size_t>(count_of(tables, "n_input_bytes"))),
        step_(device_step(rule, tables)) {
    FUSEDOPT_CHECK(written_.size() >= kRecord && written_.size() % 16 == 0, "n_input_bytes is ",
                   written_.size());
    known_.resize((written_.size() - kRecord + kPayloadBytes - 1) / kPayloadBytes);
    const DeviceGuard guard(device_);
    check(resident_blocks(step_, &reduce_blocks_, &update_blocks_), "resident_blocks");
    FUSEDOPT_CHECK(reduce_blocks_ > 0 && update_blocks_ > 0, "this GPU cannot hold one block");
  }

  // Comes before the launches of a step. Writes the pages of the table of inputs that have changed;
  // from the first captured step on, all pages.
  void begin(uintptr_t stream, bool capturing) {
    std::memcpy(&step_.record, host_inputs_, kRecord);
    stream_ = reinterpret_cast<cudaStream_t>(stream);
    captured_ = captured_ || capturing;
    for (size_t page = 0; page < known_.size(); ++page) {
      const size_t at = kRecord + page * kPayloadBytes;
      const size_t left = written_.size() - at;
      const size_t n = left < kPayloadBytes ? left : kPayloadBytes;
      const bool same = std::memcmp(&written_[at], host_inputs_ + at, n) == 0;
      if (known_[page] && same && !captured_) continue;
      known_[page] = false;
      const DeviceGuard guard(device_);
      check(write_page(inputs_ + at, host_inputs_ + at, n, stream_), "launch of write_page");
      std::memcpy(&written_[at], host_inputs_ + at, n);
      known_[page] = true;
    }
  }

  void reduce() {
    const DeviceGuard guard(device_);
    check(fusedopt::reduce(step_, reduce_blocks_, stream_), "launch of reduce");
  }

  void finalize() {
    const DeviceGuard guard(device_);
    check(fusedopt::finalize(step_, stream_), "launch of finalize");
  }

  void update() {
    const DeviceGuard guard(device_);
    check(fusedopt::update(step_, update_blocks_, stream_), "launch of update");
    ++updates_;
  }

  int64_t updates() const { return updates_; }

 private:
  const int device_;
  const char* const host_inputs_;
  char* const inputs_;
  // The device's copy of the table, and whether each page of kPayloadBytes is certain.
  std::vector<char> written_;
  std::vector<bool> known_;
  bool captured_ = false;  // replays write the table too, so its contents are uncertain
  DeviceStep step_;
  int reduce_blocks_ = 0, update_blocks_ = 0;
  cudaStream_t stream_ = nullptr;
  int64_t updates_ = 0;
};

// The number of CUDA devices. Throws if there is no driver, or if it is too old for this build.
int device_count() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver == 0) fail("CUDA: there is no NVIDIA driver");
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

py::dict versions() {
  py::dict out;
  int driver = 0, runtime = 0;
  if (cudaRuntimeGetVersion(&runtime) == cudaSuccess) out["runtime"] = runtime;
  if (cudaDriverGetVersion(&driver) == cudaSuccess) out["driver"] = driver;
  return out;
}

}  // namespace

PYBIND11_MODULE(FUSEDOPT_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of fusedopt. Internal: addresses are not checked beyond null.";
  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init<const std::string&, const py::dict&>(), py::arg("rule"), py::arg("tables"))
      .def("begin", &Plan::begin, py::arg("stream"), py::arg("capturing"))
      .def("reduce", &Plan::reduce)
      .def("finalize", &Plan::finalize)
      .def("update", &Plan::update)
      .def_property_readonly("updates", &Plan::updates, "Launches of update that did not fail.");
  m.def("device_count", &device_count);
  m.def("versions", &versions, "CUDA versions as 1000 * major + 10 * minor.");
  describe(m);
}

}  // namespace fusedopt
