// The pybind11 door of fusedopt._cpu: addresses and numbers in, nothing out but status.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>

#include "../check.h"
#include "../rule_names.h"
#include "dispatch.h"
#include "../watch/watch.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* required(uintptr_t address, const char* what) {
  FUSEDOPT_CHECK(address != 0, what, " must not be null");
  return pointer<T>(address);
}

// A plan whose tables Python has filled. Python keeps the tables alive.
struct Plan {
  PlanView view;
  StepScalars* scalars;
  int32_t n_groups = 0;  // lines the options table must have

  Plan(uintptr_t rows, uintptr_t grads, uintptr_t row_scalars, int64_t n_rows, uintptr_t chunks,
       int64_t n_chunks, int64_t n_elements, uintptr_t partials, uintptr_t step_scalars) {
    FUSEDOPT_CHECK(n_rows >= 0 && n_chunks >= 0 && n_elements >= 0, "negative count");
    view = {required<Row>(rows, "rows"),
            required<Grad>(grads, "grads"),
            required<void>(row_scalars, "row_scalars"),
            n_rows,
            required<Chunk>(chunks, "chunks"),
            n_chunks,
            n_elements,
            required<double>(partials, "partials")};
    scalars = required<StepScalars>(step_scalars, "step_scalars");
    for (int64_t r = 0; r < n_rows; ++r) {
      FUSEDOPT_CHECK(view.rows[r].group >= 0, "row ", r, " names group ", view.rows[r].group);
      if (view.rows[r].group >= n_groups) n_groups = view.rows[r].group + 1;
    }
    for (int64_t c = 0; c < n_chunks; ++c) {
      const Chunk& chunk = view.chunks[c];
      FUSEDOPT_CHECK(chunk.row >= 0 && chunk.row < n_rows, "chunk ", c, " names row ", chunk.row);
      FUSEDOPT_CHECK(chunk.index >= 0 && chunk.index * kChunk < view.rows[chunk.row].numel,
                     "chunk ", c, " lies outside its row");
    }
  }
};

struct Options {
  Rule rule;
  const void* data;

  Options(const std::string& name, const py::bytearray& table, const Plan& plan) {
    rule = rule_named(name);
    data = PyByteArray_AS_STRING(table.ptr());
    const Py_ssize_t n_bytes = PyByteArray_GET_SIZE(table.ptr());
    FUSEDOPT_CHECK(plan.n_groups * kOptionsBytes <= n_bytes, "the options table has ", n_bytes,
                   " bytes for ", plan.n_groups, " groups");
  }
};

NormType norm_type_of(double p) {
  FUSEDOPT_CHECK(p == 2.0 || p == std::numeric_limits<double>::infinity(), "norm_type ", p,
                 " is neither 2 nor inf");
  return p == 2.0 ? NormType::kTwo : NormType::kInf;
}

void reduce(const Plan& plan, double norm_type, uintptr_t grad_scale, int num_threads) {
  const NormType type = norm_type_of(norm_type);
  const float inv_scale = inverse_scale(pointer<const float>(grad_scale));
  py::gil_scoped_release release;
  current_kernels().reduce(plan.view, type, inv_scale, num_threads);
}

void finalize_step(const Plan& plan, const std::string& rule, const py::bytearray& table,
                   double norm_type, double max_grad_norm, bool measured, bool skip_nonfinite,
                   uintptr_t grad_scale, uintptr_t found_inf, uintptr_t inf_flag) {
  const Options options(rule, table, plan);
  const StepOptions step_options = {max_grad_norm, norm_type_of(norm_type), measured,
                                    skip_nonfinite};
  finalize(plan.view, options.rule, options.data, step_options, pointer<const float>(grad_scale),
           pointer<const float>(found_inf), pointer<float>(inf_flag), *plan.scalars);
}

void update(const Plan& plan, const std::string& rule, const py::bytearray& table,
            double max_grad_value, int num_threads) {
  const Options options(rule, table, plan);
  count(plan.view, *plan.scalars);
  if (plan.scalars->skip != 0.0f) return;
  const UpdateArgs args = {options.rule, options.data, plan.scalars->grad_mult,
                           static_cast<float>(max_grad_value)};
  py::gil_scoped_release release;
  current_kernels().update(plan.view, args, num_threads);
}

py::object refresh(const Watch& watch, const py::object& groups, const py::object& state,
                   uintptr_t grads) {
  Watch::Look look;
  const bool current =
      watch.refresh(groups.ptr(), state.ptr(), required<Grad>(grads, "grads"), look);
  if (!current) return py::none();
  return py::make_tuple(look.odd, look.absent, py::reinterpret_borrow<py::list>(look.held.get()));
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names.emplace_back((*k)->name);
  return names;
}

void set_simd(const std::string& name) {
  FUSEDOPT_CHECK(select_kernels(name.c_str()), "SIMD level ", name,
                 " is not in this build or not on this CPU");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fusedopt. Internal: addresses are not checked beyond null.";
  py::class_<Plan>(m, "Plan").def(py::init<uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t,
                                           int64_t, int64_t, uintptr_t, uintptr_t>(),
                                  py::arg("rows"), py::arg("grads"), py::arg("row_scalars"),
                                  py::arg("n_rows"), py::arg("chunks"), py::arg("n_chunks"),
                                  py::arg("n_elements"), py::arg("partials"),
                                  py::arg("step_scalars"));
  py::class_<Watch>(m, "Watch")
      .def(py::init(
               [](const py::list& groups, const py::dict& state, const std::vector<int>& kinds) {
                 return std::make_unique<Watch>(groups.ptr(), state.ptr(), kinds);
               }),
           py::arg("groups"), py::arg("state"), py::arg("kinds"))
      .def("refresh", &refresh, py::arg("groups"), py::arg("state"), py::arg("grads"));
  m.def(
      "use_torch",
      [](const py::object& tensor_type, const py::object& parameter_type, const py::object& is_neg,
         const py::object& exchange) {
        use_torch(tensor_type.ptr(), parameter_type.ptr(), is_neg.ptr(), exchange.ptr());
      },
      py::arg("tensor_type"), py::arg("parameter_type"), py::arg("is_neg"), py::arg("exchange"));
  m.def("reduce", &reduce, py::arg("plan"), py::arg("norm_type"), py::arg("grad_scale"),
        py::arg("num_threads"));
  m.def("finalize", &finalize_step, py::arg("plan"), py::arg("rule"), py::arg("options"),
        py::arg("norm_type"), py::arg("max_grad_norm"), py::arg("measured"),
        py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"),
        py::arg("inf_flag"));
  m.def("update", &update, py::arg("plan"), py::arg("rule"), py::arg("options"),
        py::arg("max_grad_value"), py::arg("num_threads"));
  m.def("simd_levels", &simd_levels, "Levels in this build that this CPU runs, best first.");
  m.def("simd", [] { return std::string(current_kernels().name); });
  m.def("set_simd", &set_simd);
  m.def("built_with_openmp", &built_with_openmp);
  m.attr("ROW_BYTES") = sizeof(Row);
  m.attr("GRAD_BYTES") = sizeof(Grad);
  m.attr("CHUNK_BYTES") = sizeof(Chunk);
  m.attr("CHUNK_ELEMENTS") = kChunk;
  m.attr("LANES") = kLanes;
}

}  // namespace fusedopt
