// Looks at every param, gradient and state tensor before each step, through Python's C API and
// torch's DLPack exchange functions: no libtorch, and no Python code for an ordinary tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <set>
#include <vector>

#include "../records.h"
#include "dlpack.h"

namespace fusedopt {

namespace py = pybind11;

// Owns a tensor beside Python, as a consumer of DLPack does. The exchange of a tensor that only
// Python owns takes 100 ns. Of these, 45 ns pass its ownership to C++ and back; a second owner
// makes that unnecessary. It also keeps the tensor's memory until the next plan, so only small
// tensors get one, and few of them.
struct Release {
  void operator()(dlpack::ManagedTensor* tensor) const {
    if (tensor->deleter) tensor->deleter(tensor);
  }
};
using SecondOwner = std::unique_ptr<dlpack::ManagedTensor, Release>;

// A tensor's address, device, type and layout.
struct Placement {
  const void* fetch_ahead = nullptr;  // inside torch's record of the tensor; for prefetching
  const void* data = nullptr;
  const int64_t* shape = nullptr;  // followed by the strides
  int32_t device_type = 0, device_id = 0;
  int32_t ndim = 0;
  uint8_t dtype_code = 0, dtype_bits = 0;
  bool is_tensor = false;
};

// What the kernels see of a tensor: the local part of a DTensor, owned here, or the tensor itself,
// which is only borrowed.
struct Part {
  PyObject* const tensor;
  const py::object owner = {};
};

// Remembers the optimizer for which a plan was built, and compares it with the optimizer now. Lists
// and dicts are compared by identity, in order. Tensors are compared by address as well, since
// `t.data = other` keeps the object and changes the memory.
class Watch {
 public:
  // kFrozen: only checked for a gradient; the param need not be a strided tensor.
  enum class RowKind { kReady = 0, kAwaitsState = 1, kStaged = 2, kFrozen = 3 };

  // groups: optimizer.param_groups; state: optimizer.state; kinds: a RowKind for each row; the rows
  // are the params of all groups in order. dtensor: torch's type DTensor, or None; of such tensors
  // the local part is looked at. Throws std::runtime_error.
  Watch(const py::list& groups, const py::dict& state, const std::vector<int>& kinds,
        const py::object& dtensor);

  // Fills grads[row] for every row, with odd rows as absent. Returns None when the plan no longer
  // describes the optimizer, else three lists:
  //   odd     rows whose gradient the kernels cannot read in place
  //   absent  rows whose .grad is None
  //   held    owned by the step while it runs: the .grad of each row, then the tensors of the state
  //           that have no second owner in the watch. Another thread may drop any of them while the
  //           kernels run without the GIL.
  py::object refresh(const py::object& groups, const py::object& state, uintptr_t grads) const;

 private:
  struct WatchedRow {
    py::object param;
    RowKind kind;
    Placement placement;
    bool single_element = false;
    py::object spec;  // of a DTensor: its mesh and placements
    // Addresses of the last look, for prefetching; never dereferenced.
    mutable const void* grad_object = nullptr;
    mutable const void* grad_record = nullptr;
  };
  // State without a second owner is not kept alive: a tensor that the optimizer drops is freed at
  // once. A new object at the address of a freed one passes for it only if their placement agrees.
  struct Item {  // one entry of a row's state dict
    py::object key;
    const PyObject* value;
    Placement placement;
    SecondOwner second_owner;
  };
  struct StateEntry {  // one entry of optimizer.state, and its items_[first_item ...]
    py::object key;
    const PyObject* value;
    size_t first_item, n_items;
  };

  // An attribute of a DTensor. It has __slots__, whose values lie at an offset in the object: a
  // read takes 1 ns, a lookup by name 25 ns, and a step makes six for each parameter.
  class Slot {
   public:
    Slot(const py::object& type, const char* name);
    py::object of(PyObject* object) const;  // None if it has none

   private:
    py::str name_;
    Py_ssize_t offset_ = 0;  // 0: look it up by name
  };

  Placement place(py::handle object);
  bool same_groups(PyObject* groups) const;
  bool same_state(PyObject* state, PyObject* held) const;
  bool is_dtensor(PyObject* object) const;
  Part part_of(PyObject* object) const;
  bool same_spec(const WatchedRow& row, PyObject* tensor) const;
  bool read_grad(const WatchedRow& row, PyObject* grad, Grad* out) const;
  void fetch_row(size_t r) const;
  void fetch_entry(size_t e) const;

  py::object dtensor_;
  Slot local_, spec_;
  std::vector<Py_ssize_t> group_sizes_;
  std::vector<WatchedRow> rows_;
  const PyObject* state_;
  std::vector<StateEntry> entries_;
  std::vector<Item> items_;
  bool only_sharded_ = false;               // all params are DTensors
  size_t n_held_ = 0;                       // tensors in items_ without a second owner
  std::set<std::vector<int64_t>> layouts_;  // shape and strides of every placement
};

// Takes torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg, the context manager
// torch._C.DisableTorchFunctionSubclass and the capsule torch.Tensor.__dlpack_c_exchange_api__.
// Throws if the capsule's version is not supported.
void use_torch(const py::object& tensor_type, const py::object& parameter_type,
               const py::object& is_neg, const py::object& disable_subclasses,
               const py::object& exchange);

}  // namespace fusedopt
