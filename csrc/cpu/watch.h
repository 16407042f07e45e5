// Looks at every param, gradient and state tensor before each step, through Python's C API and
// torch's DLPack exchange functions: no libtorch, and about 20 ns a tensor.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>
#include <vector>

#include "../plan.h"

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

// What a plan was built for, to be compared with what is there now. The optimizer's lists and dicts
// are compared by identity, in order; tensors by address as well, since `t.data = other` keeps the
// object and changes the memory.
class Watch {
 public:
  enum class RowKind { kReady = 0, kAwaitsState = 1, kStaged = 2 };

  // groups: optimizer.param_groups; state: optimizer.state; kinds: one RowKind a row, rows being
  // the params of all groups in order. Throws std::runtime_error.
  Watch(PyObject* groups, PyObject* state, const std::vector<int>& kinds);

  struct Look {
    std::vector<int64_t> odd;  // rows whose gradient the kernels cannot read as it lies
    int64_t absent = 0;        // number of rows whose .grad is None
  };

  // Fills grads[row] for every row, odd ones as absent. Returns false when the plan no longer
  // describes the optimizer.
  bool refresh(PyObject* groups, PyObject* state, Grad* grads, Look& look) const;

 private:
  struct Placement {  // where a tensor lies and how
    const void* data = nullptr;
    int32_t device_type = 0, device_id = 0;
    int dtype_code = 0, dtype_bits = 0;
    std::vector<int64_t> shape, strides;

    bool read(PyObject* object);  // false: not a strided tensor
    bool still_of(PyObject* object) const;
  };
  struct Item {  // one entry of a row's state dict
    PyRef key, value;
    Placement placement;
    bool is_tensor = false;
  };
  struct WatchedRow {
    PyRef param;
    RowKind kind;
    Placement placement;
  };
  struct StateEntry {  // one entry of optimizer.state
    PyRef key, value;
    std::vector<Item> items;
  };

  bool same_groups(PyObject* groups) const;
  bool same_state(PyObject* state) const;
  static bool read_grad(const WatchedRow& row, PyObject* grad, Grad* out);

  std::vector<Py_ssize_t> group_sizes_;
  std::vector<WatchedRow> rows_;
  PyRef state_;
  std::vector<StateEntry> entries_;
};

// torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg and the capsule
// torch.Tensor.__dlpack_c_exchange_api__, whose version may not be understood: then it throws.
void use_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* is_neg,
               PyObject* exchange_capsule);

}  // namespace fusedopt
