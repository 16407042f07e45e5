// The pybind11 door of fusedopt._cuda: addresses and numbers in, nothing out but errors.
#include <pybind11/pybind11.h>

#include <limits>
#include <string>

#include "../check.h"
#include "../rule_names.h"
#include "device_plan.h"

#if !defined(FUSEDOPT_CUDA_MODULE)
#define FUSEDOPT_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace fusedopt {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* required(const py::dict& tables, const char* name) {
  const auto address = tables[name].cast<uintptr_t>();
  FUSEDOPT_CHECK(address != 0 && address % 16 == 0, name, " must be an address on 16 bytes, not ",
                 address);
  return pointer<T>(address);
}

std::unique_ptr<DevicePlan> make_plan(const py::dict& t, const std::string& rule, bool amsgrad) {
  DeviceTables tables = {};
  tables.device = t["device"].cast<int>();
  tables.n_groups = t["n_groups"].cast<int32_t>();
  tables.n_rows = t["n_rows"].cast<int64_t>();
  tables.n_chunks = t["n_chunks"].cast<int64_t>();
  tables.n_elements = t["n_elements"].cast<int64_t>();
  tables.n_totals = t["n_totals"].cast<int32_t>();
  tables.own_total = t["own_total"].cast<int32_t>();
  tables.host_inputs = pointer<const void>(t["host_inputs"].cast<uintptr_t>());
  tables.inputs = required<void>(t, "inputs");
  tables.rows = required<const Row>(t, "rows");
  tables.chunks = required<const Chunk>(t, "chunks");
  tables.partials = required<double>(t, "partials");
  tables.row_steps = required<void>(t, "row_steps");
  tables.totals = required<double>(t, "totals");
  tables.ticket = required<uint32_t>(t, "ticket");
  FUSEDOPT_CHECK(tables.host_inputs, "host_inputs must not be null");
  FUSEDOPT_CHECK(tables.n_groups >= 0 && tables.n_rows >= 0 && tables.n_chunks >= 0,
                 "negative count");
  FUSEDOPT_CHECK(tables.own_total >= 0 && tables.own_total < tables.n_totals,
                 "own_total lies outside of totals");
  return std::make_unique<DevicePlan>(tables, rule_named(rule), amsgrad);
}

void begin(DevicePlan& plan, double norm_type, double max_grad_norm, bool measured,
           bool skip_nonfinite, double max_grad_value, uintptr_t grad_scale, uintptr_t found_inf,
           uintptr_t inf_flag, uintptr_t scalars, int32_t n_device_numbers, uintptr_t stream,
           bool capturing) {
  FUSEDOPT_CHECK(norm_type == 2.0 || norm_type == std::numeric_limits<double>::infinity(),
                 "norm_type ", norm_type, " is neither 2 nor inf");
  FUSEDOPT_CHECK(scalars, "scalars must not be null");
  const NormType type = norm_type == 2.0 ? NormType::kTwo : NormType::kInf;
  const StepArguments arguments = {{max_grad_norm, type, measured, skip_nonfinite},
                                   static_cast<float>(max_grad_value),
                                   pointer<const float>(grad_scale),
                                   pointer<const float>(found_inf),
                                   pointer<float>(inf_flag),
                                   pointer<StepScalars>(scalars),
                                   n_device_numbers};
  plan.begin(arguments, pointer<CUstream_st>(stream), capturing);
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
      .def(py::init(&make_plan), py::arg("tables"), py::arg("rule"), py::arg("amsgrad"))
      .def("begin", &begin, py::arg("norm_type"), py::arg("max_grad_norm"), py::arg("measured"),
           py::arg("skip_nonfinite"), py::arg("max_grad_value"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("inf_flag"), py::arg("scalars"),
           py::arg("n_device_numbers"), py::arg("stream"), py::arg("capturing"))
      .def("reduce", &DevicePlan::reduce, py::arg("finalizes"))
      .def("finalize", &DevicePlan::finalize)
      .def("update", &DevicePlan::update)
      .def_property_readonly("updates", &DevicePlan::updates);
  m.def("device_count", &device_count);
  m.def("versions", &versions, "CUDA versions as 1000 * major + 10 * minor.");
  m.attr("ROW_BYTES") = sizeof(Row);
  m.attr("GRAD_BYTES") = sizeof(Grad);
  m.attr("CHUNK_BYTES") = sizeof(Chunk);
  m.attr("CHUNK_ELEMENTS") = kChunk;
  m.attr("ROW_STEP_BYTES") = sizeof(RowStep<AdamW>);
  m.attr("OPTIONS_BYTES") = kOptionsBytes;
  m.attr("DEVICE_NUMBER_BYTES") = sizeof(DeviceNumber);
  m.attr("DEVICE_NUMBERS") = kDeviceNumbers;
}

}  // namespace fusedopt
