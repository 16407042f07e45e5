// The pybind11 door of fusedopt._cuda: addresses and numbers in, nothing out but errors.
#include "../bindings.h"

#include <memory>

#include "device_plan.h"

#if !defined(FUSEDOPT_CUDA_MODULE)
#define FUSEDOPT_CUDA_MODULE _cuda
#endif

namespace fusedopt {
namespace {

std::unique_ptr<DevicePlan> make_plan(const std::string& rule, const py::dict& tables) {
  DeviceStep step = {};
  step.plan = plan_view(tables);
  step.fields = required<double>(tables, "options");
  step.numbers = required<const DeviceNumber>(tables, "numbers");
  step.sums = required<Word>(tables, "sums");
  step.words = required<Word>(tables, "words");
  step.ticket = required<uint32_t>(tables, "ticket");
  step.n_devices = static_cast<int32_t>(count_of(tables, "n_devices"));
  step.own_number = static_cast<int32_t>(count_of(tables, "own_number"));
  step.rule = rule_named(rule);
  step.n_states = static_cast<int32_t>(count_of(tables, "n_states"));
  step.half_states = tables["half_states"].cast<bool>();
  const Inputs inputs = {required<const StepRecord>(tables, "host_inputs"),
                         required<void>(tables, "inputs"),
                         static_cast<size_t>(count_of(tables, "n_input_bytes"))};
  FUSEDOPT_CHECK(step.own_number < step.n_devices, "own_number lies outside of words");
  FUSEDOPT_CHECK(inputs.bytes >= sizeof(StepRecord) && inputs.bytes % 16 == 0, "n_input_bytes is ",
                 inputs.bytes);
  return std::make_unique<DevicePlan>(tables["device"].cast<int>(), inputs, step);
}

py::dict versions() {
  py::dict out;
  int driver = 0;
  int runtime = 0;
  if (cudaRuntimeGetVersion(&runtime) == cudaSuccess) out["runtime"] = runtime;
  if (cudaDriverGetVersion(&driver) == cudaSuccess) out["driver"] = driver;
  return out;
}

}  // namespace

PYBIND11_MODULE(FUSEDOPT_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of fusedopt. Internal: addresses are not checked beyond null.";
  py::class_<DevicePlan>(m, "Plan", py::module_local())
      .def(py::init(&make_plan), py::arg("rule"), py::arg("tables"))
      .def(
          "begin",
          [](DevicePlan& plan, uintptr_t stream, bool capturing) {
            plan.begin(reinterpret_cast<cudaStream_t>(stream), capturing);
          },
          py::arg("stream"), py::arg("capturing"))
      .def("reduce", &DevicePlan::reduce, py::arg("finalizes"))
      .def("finalize", &DevicePlan::finalize)
      .def("update", &DevicePlan::update)
      .def_property_readonly("updates", &DevicePlan::updates);
  m.def("device_count", &device_count);
  m.def("versions", &versions, "CUDA versions as 1000 * major + 10 * minor.");
  describe(m);
}

}  // namespace fusedopt
