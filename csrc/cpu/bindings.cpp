// The pybind11 bindings of fusedopt._cpu. Plans take addresses and numbers, and return nothing.
#include "../bindings.h"

#include <pybind11/stl.h>

#include <cstring>

#include "../watch/watch.h"
#include "dispatch.h"

namespace fusedopt {
namespace {

// The verbs over the tables of a plan. Python packs the step's record in the verb `begin`.
class Plan {
 public:
  Plan(const std::string& rule, const py::dict& tables)
      : rule_(rule_named(rule)),
        view_(plan_view(tables)),
        step_(required<const StepRecord>(tables, "step")),
        words_(required<uint64_t>(tables, "words")) {
    const int64_t n_groups = count_of(tables, "n_groups");
    for (int64_t r = 0; r < view_.n_rows; ++r) {
      const int32_t group = view_.rows[r].group;
      FUSEDOPT_CHECK(group >= 0 && group < n_groups, "row ", r, " names group ", group);
    }
    for (int64_t c = 0; c < view_.n_chunks; ++c) {
      const Chunk& chunk = view_.chunks[c];
      FUSEDOPT_CHECK(chunk.row >= 0 && chunk.row < view_.n_rows, "chunk ", c, " names row ",
                     chunk.row);
      FUSEDOPT_CHECK(chunk.index >= 0 && chunk.index * kChunk < view_.rows[chunk.row].numel,
                     "chunk ", c, " lies outside its row");
    }
  }

  void reduce(int num_threads) const {
    py::gil_scoped_release release;
    std::memset(words_, 0, kWords * sizeof *words_);
    current_kernels().reduce(view_, *step_, words_, num_threads);
    for (int w = 0; step_->n_ranks > 0 && w < kWords; ++w) words_[w] += word_of_rank(*step_, w);
  }

  void finalize() const { fusedopt::finalize(view_, rule_, *step_, words_); }

  void update(int num_threads) const {
    count(view_, rule_, *step_);
    if (step_->scalars->skip != 0.0f) return;
    py::gil_scoped_release release;
    current_kernels().update(view_, rule_, *step_, num_threads);
  }

 private:
  const int rule_;
  const PlanView view_;
  const StepRecord* const step_;
  uint64_t* const words_;
};

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
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const py::dict&>(), py::arg("rule"), py::arg("tables"))
      .def("reduce", &Plan::reduce, py::arg("num_threads"))
      .def("finalize", &Plan::finalize)
      .def("update", &Plan::update, py::arg("num_threads"));
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::dict&, const std::vector<int>&, const py::object&>(),
           py::arg("groups"), py::arg("state"), py::arg("kinds"), py::arg("dtensor") = py::none())
      .def("refresh", &Watch::refresh, py::arg("groups"), py::arg("state"), py::arg("grads"));
  m.def("use_torch", &use_torch, py::arg("tensor_type"), py::arg("parameter_type"),
        py::arg("is_neg"), py::arg("disable_subclasses"), py::arg("exchange"));
  m.def("simd_levels", &simd_levels, "Levels in this build that this CPU runs, best first.");
  m.def("simd", [] { return std::string(current_kernels().name); });
  m.def("set_simd", &set_simd);
  m.def("built_with_openmp", &built_with_openmp);
  using Kind = Watch::RowKind;
  for (auto [name, kind] : {std::pair("READY", Kind::kReady),
                            {"AWAITS_STATE", Kind::kAwaitsState},
                            {"STAGED", Kind::kStaged},
                            {"FROZEN", Kind::kFrozen}}) {
    m.attr(name) = static_cast<int>(kind);
  }
  describe(m);
}

}  // namespace fusedopt
