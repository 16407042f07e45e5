// Looks at every param, gradient and state tensor before each step, through Python's C API and
// torch's DLPack exchange functions: no libtorch, and nothing interpreted for an ordinary tensor.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <map>
#include <vector>

#include "../records.h"
#include "dlpack.h"

namespace fusedopt {

// An owned reference; copies are not needed and not offered.
class PyRef {
 public:
  PyRef() = default;
  explicit PyRef(PyObject* owned) : object_(owned) {}
  PyRef(PyRef&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  PyRef& operator=(PyRef&& other) noexcept {
    PyObject* spent = object_;
    object_ = other.object_;
    other.object_ = nullptr;
    Py_XDECREF(spent);
    return *this;
  }
  ~PyRef() { Py_XDECREF(object_); }
  static PyRef borrow(PyObject* object) {
    Py_XINCREF(object);
    return PyRef(object);
  }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// Owns a tensor beside Python, as a consumer of DLPack does. The exchange of a tensor that only
// Python owns takes 100 ns. Of these, 45 ns pass its ownership to C++ and back; a second owner
// makes that unnecessary. It also keeps the tensor's memory until the next plan, so only small
// tensors get one, and few of them.
class SecondOwner {
 public:
  SecondOwner() = default;
  explicit SecondOwner(PyObject* tensor);
  SecondOwner(SecondOwner&& other) noexcept : managed_(other.managed_) { other.managed_ = nullptr; }
  SecondOwner& operator=(SecondOwner&&) = delete;
  explicit operator bool() const { return managed_ != nullptr; }
  ~SecondOwner();

 private:
  dlpack::ManagedTensor* managed_ = nullptr;
};

// What a plan was built for, to be compared with what is there now. The optimizer's lists and dicts
// are compared by identity, in order; tensors by address as well, since `t.data = other` keeps the
// object and changes the memory.
class Watch {
 public:
  // kFrozen: nothing is looked at but whether there is a gradient; it need not be a strided tensor.
  enum class RowKind { kReady = 0, kAwaitsState = 1, kStaged = 2, kFrozen = 3 };

  // groups: optimizer.param_groups; state: optimizer.state; kinds: one RowKind a row, rows being
  // the params of all groups in order. Throws std::runtime_error.
  Watch(PyObject* groups, PyObject* state, const std::vector<int>& kinds);

  struct Look {
    std::vector<int64_t> odd;     // rows whose gradient the kernels cannot read as it lies
    std::vector<int64_t> absent;  // rows whose .grad is None
    // A list that the step owns while it runs: the .grad of each row, then the tensors of the state
    // that have no second owner in the watch. Another thread may drop any of them while the kernels
    // run without the GIL.
    PyRef held;
  };

  // Fills grads[row] for every row, odd ones as absent. Returns false when the plan no longer
  // describes the optimizer.
  bool refresh(PyObject* groups, PyObject* state, Grad* grads, Look& look) const;

 private:
  // Where a tensor lies and how. Sizes and strides are in layouts_, where equal ones are stored
  // once.
  struct Placement {
    const void* fetch_ahead = nullptr;  // inside torch's own record of the tensor; a hint
    const void* data = nullptr;
    size_t layout = 0;  // layouts_[layout ...]: shape, then strides
    int32_t device_type = 0, device_id = 0;
    int32_t ndim = 0;
    uint8_t dtype_code = 0, dtype_bits = 0;
    bool is_tensor = false;
  };
  struct WatchedRow {
    PyRef param;
    // Of the last look: hints, never followed.
    mutable const void* grad_object = nullptr;
    mutable const void* grad_record = nullptr;
    RowKind kind;
    Placement placement;
    bool single_element = false;
  };
  // State is not kept alive: what the optimizer drops is freed at once. An object that has taken
  // the place of another's passes for it only if all that is read of a tensor is the same.
  struct Item {  // one entry of a row's state dict
    PyRef key;
    const PyObject* value;
    Placement placement;
    SecondOwner second_owner;
  };
  struct StateEntry {  // one entry of optimizer.state, and its items_[first_item ...]
    PyRef key;
    const PyObject* value;
    size_t first_item, n_items;
  };

  Placement place(PyObject* object, std::map<std::vector<int64_t>, size_t>& known_layouts);
  bool same_groups(PyObject* groups) const;
  bool same_state(PyObject* state, PyObject* held) const;
  bool same_layout(const Placement& placement, const dlpack::Tensor& t) const;
  int64_t numel(const Placement& placement) const;
  int64_t nbytes(const Placement& placement) const;
  bool in_place(const Placement& placement, PyObject* object) const;
  bool read_grad(const WatchedRow& row, PyObject* grad, Grad* out) const;
  void fetch_row(size_t r) const;
  void fetch_entry(size_t e) const;

  std::vector<Py_ssize_t> group_sizes_;
  std::vector<WatchedRow> rows_;
  const PyObject* state_;
  std::vector<StateEntry> entries_;
  std::vector<Item> items_;
  size_t n_held_ = 0;  // tensors in items_ without a second owner
  std::vector<int64_t> layouts_;
};

// torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg and the capsule
// torch.Tensor.__dlpack_c_exchange_api__, whose version may not be understood: then it throws.
void use_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* is_neg,
               PyObject* exchange_capsule);

}  // namespace fusedopt
