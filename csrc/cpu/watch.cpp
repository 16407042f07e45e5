#include "watch.h"

#include "../check.h"
#include "dlpack.h"

namespace fusedopt {
namespace {

const dlpack::ExchangeApi* exchange = nullptr;

// False for anything that is not a strided tensor (sparse, a functional wrapper, not a tensor).
bool view(PyObject* object, dlpack::Tensor& out) {
  if (exchange->dltensor_from_py_object(object, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  return true;
}

const void* address(const dlpack::Tensor& t) {
  return static_cast<const char*>(t.data) + t.byte_offset;
}

bool same_shape(const std::vector<int64_t>& shape, const dlpack::Tensor& t) {
  if (static_cast<size_t>(t.ndim) != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (t.shape[d] != shape[d]) return false;
  }
  return true;
}

// A dimension of one element may carry any stride.
bool same_strides(const std::vector<int64_t>& strides, const dlpack::Tensor& t) {
  for (size_t d = 0; d < strides.size(); ++d) {
    if (t.shape[d] > 1 && t.strides[d] != strides[d]) return false;
  }
  return true;
}

bool kernel_dtype(const dlpack::Tensor& t, DType& dtype) {
  if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 32) {
    dtype = DType::kFloat32;
  } else if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 16) {
    dtype = DType::kFloat16;
  } else if (t.dtype_code == dlpack::kBfloat && t.dtype_bits == 16) {
    dtype = DType::kBFloat16;
  } else {
    return false;
  }
  return true;
}

PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  FUSEDOPT_CHECK(name, "out of memory");
  return name;
}

// Borrowed; null when the group has no list of params.
PyObject* params_of(PyObject* group) {
  static PyObject* const kParams = interned("params");
  if (!PyDict_Check(group)) return nullptr;
  PyObject* params = PyDict_GetItem(group, kParams);
  return params && PyList_Check(params) ? params : nullptr;
}

}  // namespace

void use_dlpack_exchange(PyObject* capsule) {
  auto* api =
      static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) {
    PyErr_Clear();
    fail("torch's __dlpack_c_exchange_api__ is not a dlpack_exchange_api capsule");
  }
  while (api && api->version.major != 1) api = api->previous;
  FUSEDOPT_CHECK(api && api->dltensor_from_py_object,
                 "this torch offers no DLPack 1.x C exchange; use torch 2.11 or newer");
  exchange = api;
}

Watch::Watch(PyObject* groups, PyObject* state, const std::vector<int>& kinds)
    : state_(PyRef::borrow(state)) {
  FUSEDOPT_CHECK(exchange, "use_dlpack_exchange() has not been called");
  FUSEDOPT_CHECK(PyList_Check(groups) && PyDict_Check(state),
                 "param_groups must be a list and state a dict");
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups, g));
    FUSEDOPT_CHECK(params, "param group ", g, " has no list of params");
    group_sizes_.push_back(PyList_GET_SIZE(params));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      dlpack::Tensor t;
      FUSEDOPT_CHECK(rows_.size() < kinds.size(), "fewer row kinds than params");
      FUSEDOPT_CHECK(view(PyList_GET_ITEM(params, i), t), "param ", i, " of group ", g,
                     " is not a strided tensor");
      WatchedRow row;
      row.param = PyRef::borrow(PyList_GET_ITEM(params, i));
      row.kind = static_cast<RowKind>(kinds[rows_.size()]);
      row.data = address(t);
      row.device_type = t.device_type;
      row.device_id = t.device_id;
      row.dtype_code = t.dtype_code;
      row.dtype_bits = t.dtype_bits;
      row.shape.assign(t.shape, t.shape + t.ndim);
      row.strides.assign(t.strides, t.strides + t.ndim);
      rows_.push_back(std::move(row));
    }
  }
  FUSEDOPT_CHECK(rows_.size() == kinds.size(), "more row kinds than params");

  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    StateEntry entry;
    entry.key = PyRef::borrow(key);
    entry.value = PyRef::borrow(value);
    PyObject *name, *item;
    for (Py_ssize_t in = 0; PyDict_Check(value) && PyDict_Next(value, &in, &name, &item);) {
      Item watched;
      dlpack::Tensor t;
      watched.key = PyRef::borrow(name);
      watched.value = PyRef::borrow(item);
      watched.is_tensor = view(item, t);
      watched.data = watched.is_tensor ? address(t) : nullptr;
      entry.items.push_back(std::move(watched));
    }
    entries_.push_back(std::move(entry));
  }
}

bool Watch::same_groups(PyObject* groups) const {
  if (!PyList_Check(groups)) return false;
  if (static_cast<size_t>(PyList_GET_SIZE(groups)) != group_sizes_.size()) return false;
  size_t r = 0;
  for (size_t g = 0; g < group_sizes_.size(); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g)));
    if (!params || PyList_GET_SIZE(params) != group_sizes_[g]) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i, ++r) {
      if (PyList_GET_ITEM(params, i) != rows_[r].param.get()) return false;
    }
  }
  return true;
}

bool Watch::same_state(PyObject* state) const {
  if (state != state_.get()) return false;
  if (static_cast<size_t>(PyDict_Size(state)) != entries_.size()) return false;
  PyObject *key, *value;
  size_t e = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++e) {
    const StateEntry& entry = entries_[e];
    if (key != entry.key.get() || value != entry.value.get()) return false;
    if (!PyDict_Check(value)) continue;
    if (static_cast<size_t>(PyDict_Size(value)) != entry.items.size()) return false;
    PyObject *name, *item;
    size_t i = 0;
    for (Py_ssize_t in = 0; PyDict_Next(value, &in, &name, &item); ++i) {
      const Item& watched = entry.items[i];
      if (name != watched.key.get() || item != watched.value.get()) return false;
      dlpack::Tensor t;
      if (watched.is_tensor && (!view(item, t) || address(t) != watched.data)) return false;
    }
  }
  return true;
}

bool Watch::same_param(const WatchedRow& row) const {
  dlpack::Tensor t;
  return view(row.param.get(), t) && address(t) == row.data && t.dtype_code == row.dtype_code &&
         t.dtype_bits == row.dtype_bits && t.device_type == row.device_type &&
         t.device_id == row.device_id && same_shape(row.shape, t) && same_strides(row.strides, t);
}

bool Watch::read_grad(const WatchedRow& row, PyObject* grad, Grad* out) const {
  dlpack::Tensor t;
  if (row.kind == RowKind::kStaged || !view(grad, t)) return false;
  if (t.device_type != row.device_type || t.device_id != row.device_id) return false;
  if (!same_shape(row.shape, t) || !same_strides(row.strides, t)) return false;
  if (!kernel_dtype(t, out->dtype)) return false;
  out->data = address(t);
  out->present = 1;
  return true;
}

bool Watch::refresh(PyObject* groups, PyObject* state, Grad* grads, Look& look) const {
  static PyObject* const kGrad = interned("grad");
  if (!same_groups(groups) || !same_state(state)) return false;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const WatchedRow& row = rows_[r];
    if (!same_param(row)) return false;
    const PyRef grad(PyObject_GetAttr(row.param.get(), kGrad));
    if (!grad.get()) {
      PyErr_Clear();
      return false;
    }
    grads[r] = {nullptr, DType::kFloat32, 0};
    if (grad.get() == Py_None) {
      ++look.absent;
      continue;
    }
    if (row.kind == RowKind::kAwaitsState) return false;
    if (!read_grad(row, grad.get(), &grads[r])) look.odd.push_back(static_cast<int64_t>(r));
  }
  return true;
}

}  // namespace fusedopt
