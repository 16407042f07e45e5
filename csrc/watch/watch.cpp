#include "watch.h"

#include "../check.h"
#include "dlpack.h"

namespace fusedopt {
namespace {

struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* is_neg = nullptr;
  const PyGetSetDef* grad = nullptr;  // of torch.Tensor; null: ask by name
} torch;

PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  FUSEDOPT_CHECK(name, "out of memory");
  return name;
}

// Null unless the type answers for the attribute with a C function.
const PyGetSetDef* getset_named(PyObject* type, const char* name) {
  const PyRef attribute(PyObject_GetAttrString(type, name));
  if (!attribute.get()) PyErr_Clear();
  if (!attribute.get() || Py_TYPE(attribute.get()) != &PyGetSetDescr_Type) return nullptr;
  return reinterpret_cast<PyGetSetDescrObject*>(attribute.get())->d_getset;  // static in torch
}

// False for anything that is not a strided tensor (sparse, a functional wrapper, not a tensor).
bool view(PyObject* object, dlpack::Tensor& out) {
  if (torch.exchange->dltensor_from_py_object(object, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// A subclass may keep its values elsewhere, which the exchange does not show.
bool plain_tensor(PyObject* object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type || type == torch.parameter_type;
}

// A lazily negated view, which the exchange does not show either. Such views come from the
// imaginary part of a conjugate and have a stride of two, so that only a single element can look
// dense.
bool negated(PyObject* tensor) {
  const PyRef answer(PyObject_Vectorcall(torch.is_neg, &tensor, 1, nullptr));
  if (!answer.get()) PyErr_Clear();
  return answer.get() != Py_False;
}

// New reference, or null with an error set. For the two plain types the attribute's own function is
// called, which leaves out the search for the name.
PyObject* grad_of(PyObject* param) {
  static PyObject* const kGrad = interned("grad");
  if (torch.grad && plain_tensor(param)) return torch.grad->get(param, torch.grad->closure);
  return PyObject_GetAttr(param, kGrad);
}

const void* address(const dlpack::Tensor& t) {
  return static_cast<const char*>(t.data) + t.byte_offset;
}

// False for a dtype that no kernel reads.
bool kernel_codec(const dlpack::Tensor& t, Codec& codec) {
  if (t.dtype_bits == 32 && t.dtype_code == dlpack::kFloat) {
    codec = Codec::kFloat32;
    return true;
  }
  bool found = false;
  HalfCodecs::for_each([&](auto half) {
    if (t.dtype_bits != 16 || t.dtype_code != half.kTypeCode) return;
    codec = half.kCodec;
    found = true;
  });
  return found;
}

// A thousand tensors are more than a cache holds, and a look at each is a chain of dependent
// misses. So the lines of the tensors to come are asked for this many rows ahead.
constexpr size_t kAhead = 8;

// Of tensors with a second owner: see SecondOwner.
constexpr int64_t kSmall = 4 << 10;  // bytes of one: a page, of which nothing returns to the system
constexpr int64_t kSmallInAll = 8 << 20;  // bytes

// The Python object, and torch's record around the sizes that the exchange showed.
void fetch(const void* object, const void* record) {
  __builtin_prefetch(object);
  const auto middle = reinterpret_cast<uintptr_t>(record);  // a hint: null and stale are allowed
  for (uintptr_t at = middle - 128; at != middle + 192; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(at));
  }
}

// Borrowed; null when the group has no sequence of params.
PyObject* params_of(PyObject* group) {
  static PyObject* const kParams = interned("params");
  if (!PyDict_Check(group)) return nullptr;
  PyObject* params = PyDict_GetItem(group, kParams);
  return params && (PyList_Check(params) || PyTuple_Check(params)) ? params : nullptr;
}

}  // namespace

void use_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* is_neg,
               PyObject* exchange_capsule) {
  auto* api = static_cast<dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(exchange_capsule, "dlpack_exchange_api"));
  if (!api) {
    PyErr_Clear();
    fail("torch's __dlpack_c_exchange_api__ is not a dlpack_exchange_api capsule");
  }
  while (api && api->version.major != 1) api = api->previous;
  FUSEDOPT_CHECK(api && api->dltensor_from_py_object,
                 "this torch offers no DLPack 1.x C exchange; use torch 2.11 or newer");
  // Never given back: the module keeps them as long as the process lives.
  for (PyObject* object : {tensor_type, parameter_type, is_neg}) Py_INCREF(object);
  torch = {api, tensor_type, parameter_type, is_neg, getset_named(tensor_type, "grad")};
}

SecondOwner::SecondOwner(PyObject* tensor) {
  if (torch.exchange->managed_from_py_object(tensor, &managed_) != 0) {
    PyErr_Clear();
    managed_ = nullptr;  // not exchangeable as a consumer: slower, not wrong
  }
}

SecondOwner::~SecondOwner() {
  if (managed_ && managed_->deleter) managed_->deleter(managed_);
}

Watch::Placement Watch::place(PyObject* object,
                              std::map<std::vector<int64_t>, size_t>& known_layouts) {
  Placement placement;
  dlpack::Tensor t;
  if (!view(object, t)) return placement;
  std::vector<int64_t> layout(t.shape, t.shape + t.ndim);
  layout.insert(layout.end(), t.strides, t.strides + t.ndim);
  const auto found = known_layouts.emplace(layout, layouts_.size());
  if (found.second) layouts_.insert(layouts_.end(), layout.begin(), layout.end());
  placement.fetch_ahead = t.shape;
  placement.data = address(t);
  placement.layout = found.first->second;
  placement.device_type = t.device_type;
  placement.device_id = t.device_id;
  placement.ndim = t.ndim;
  placement.dtype_code = t.dtype_code;
  placement.dtype_bits = t.dtype_bits;
  placement.is_tensor = true;
  return placement;
}

// A dimension of one element may carry any stride.
bool Watch::same_layout(const Placement& placement, const dlpack::Tensor& t) const {
  if (t.ndim != placement.ndim) return false;
  const int64_t* shape = layouts_.data() + placement.layout;
  const int64_t* strides = shape + t.ndim;
  for (int32_t d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != shape[d] || (shape[d] > 1 && t.strides[d] != strides[d])) return false;
  }
  return true;
}

int64_t Watch::nbytes(const Placement& placement) const {
  return numel(placement) * placement.dtype_bits / 8;
}

int64_t Watch::numel(const Placement& placement) const {
  const int64_t* shape = layouts_.data() + placement.layout;
  int64_t n = 1;
  for (int32_t d = 0; d < placement.ndim; ++d) n *= shape[d];
  return n;
}

bool Watch::in_place(const Placement& placement, PyObject* object) const {
  dlpack::Tensor t;
  return view(object, t) && address(t) == placement.data && t.dtype_code == placement.dtype_code &&
         t.dtype_bits == placement.dtype_bits && t.device_type == placement.device_type &&
         t.device_id == placement.device_id && same_layout(placement, t);
}

Watch::Watch(PyObject* groups, PyObject* state, const std::vector<int>& kinds) : state_(state) {
  FUSEDOPT_CHECK(torch.exchange, "use_torch() has not been called");
  FUSEDOPT_CHECK(PyList_Check(groups) && PyDict_Check(state),
                 "param_groups must be a list and state a dict");
  std::map<std::vector<int64_t>, size_t> layouts;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups, g));
    FUSEDOPT_CHECK(params, "param group ", g, " has no list of params");
    group_sizes_.push_back(PySequence_Fast_GET_SIZE(params));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
      FUSEDOPT_CHECK(rows_.size() < kinds.size(), "fewer row kinds than params");
      WatchedRow row;
      row.param = PyRef::borrow(PySequence_Fast_GET_ITEM(params, i));
      row.kind = static_cast<RowKind>(kinds[rows_.size()]);
      if (row.kind != RowKind::kFrozen) {
        row.placement = place(row.param.get(), layouts);
        FUSEDOPT_CHECK(row.placement.is_tensor, "param ", i, " of group ", g,
                       " is not a strided tensor");
        row.single_element = numel(row.placement) == 1;
      }
      rows_.push_back(std::move(row));
    }
  }
  FUSEDOPT_CHECK(rows_.size() == kinds.size(), "more row kinds than params");

  int64_t twice_owned = kSmallInAll;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    StateEntry entry;
    entry.key = PyRef::borrow(key);
    entry.value = value;
    entry.first_item = items_.size();
    PyObject *name, *item;
    for (Py_ssize_t in = 0; PyDict_Check(value) && PyDict_Next(value, &in, &name, &item);) {
      const Placement placement = place(item, layouts);
      const int64_t n_bytes = placement.is_tensor ? nbytes(placement) : 0;
      const bool owned = placement.is_tensor && n_bytes <= kSmall && twice_owned >= n_bytes;
      if (owned) twice_owned -= n_bytes;
      items_.push_back(
          {PyRef::borrow(name), item, placement, owned ? SecondOwner(item) : SecondOwner()});
      if (!items_.back().second_owner) ++n_held_;
    }
    entry.n_items = items_.size() - entry.first_item;
    entries_.push_back(std::move(entry));
  }
}

bool Watch::same_groups(PyObject* groups) const {
  if (!PyList_Check(groups)) return false;
  if (static_cast<size_t>(PyList_GET_SIZE(groups)) != group_sizes_.size()) return false;
  size_t r = 0;
  for (size_t g = 0; g < group_sizes_.size(); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g)));
    if (!params || PySequence_Fast_GET_SIZE(params) != group_sizes_[g]) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i, ++r) {
      if (PySequence_Fast_GET_ITEM(params, i) != rows_[r].param.get()) return false;
    }
  }
  return true;
}

bool Watch::same_state(PyObject* state, PyObject* held) const {
  if (state != state_) return false;
  if (static_cast<size_t>(PyDict_Size(state)) != entries_.size()) return false;
  PyObject *key, *value;
  auto at_held = static_cast<Py_ssize_t>(rows_.size());
  size_t e = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++e) {
    fetch_entry(e + kAhead);
    const StateEntry& entry = entries_[e];
    if (key != entry.key.get() || value != entry.value) return false;
    if (!PyDict_Check(value)) {
      if (entry.n_items > 0) return false;  // where a dict was, something else has come to lie
      continue;
    }
    if (static_cast<size_t>(PyDict_Size(value)) != entry.n_items) return false;
    PyObject *name, *item;
    size_t i = entry.first_item;
    for (Py_ssize_t in = 0; PyDict_Next(value, &in, &name, &item); ++i) {
      const Item& watched = items_[i];
      if (name != watched.key.get() || item != watched.value) return false;
      if (!watched.placement.is_tensor) continue;
      if (!in_place(watched.placement, item)) return false;
      if (watched.second_owner) continue;
      Py_INCREF(item);
      PyList_SET_ITEM(held, at_held++, item);
    }
  }
  return true;
}

void Watch::fetch_row(size_t r) const {
  if (r >= rows_.size()) return;
  const WatchedRow& row = rows_[r];
  fetch(row.param.get(), row.placement.fetch_ahead);
  fetch(row.grad_object, row.grad_record);
}

void Watch::fetch_entry(size_t e) const {
  if (e >= entries_.size()) return;
  const StateEntry& entry = entries_[e];
  __builtin_prefetch(entry.value);
  for (size_t i = entry.first_item; i < entry.first_item + entry.n_items; ++i) {
    fetch(items_[i].value, items_[i].placement.fetch_ahead);
  }
}

bool Watch::read_grad(const WatchedRow& row, PyObject* grad, Grad* out) const {
  const Placement& like = row.placement;
  dlpack::Tensor t;
  if (row.kind == RowKind::kStaged || !plain_tensor(grad) || !view(grad, t)) return false;
  if (t.device_type != like.device_type || t.device_id != like.device_id) return false;
  if (!same_layout(like, t) || !kernel_codec(t, out->codec)) return false;
  if (row.single_element && negated(grad)) return false;
  if (!address(t) && like.data) return false;  // zeros that were never allocated
  out->data = address(t);
  out->present = 1;
  row.grad_object = grad;
  row.grad_record = t.shape;
  return true;
}

bool Watch::refresh(PyObject* groups, PyObject* state, Grad* grads, Look& look) const {
  look.held = PyRef(PyList_New(static_cast<Py_ssize_t>(rows_.size() + n_held_)));
  FUSEDOPT_CHECK(look.held.get(), "out of memory");
  if (!same_groups(groups) || !same_state(state, look.held.get())) return false;
  for (size_t r = 0; r < rows_.size(); ++r) {
    fetch_row(r + kAhead);
    const WatchedRow& row = rows_[r];
    const bool frozen = row.kind == RowKind::kFrozen;
    if (!frozen && !in_place(row.placement, row.param.get())) return false;
    if (row.single_element && row.kind != RowKind::kStaged && negated(row.param.get()))
      return false;
    PyObject* const grad = grad_of(row.param.get());
    if (!grad) {
      PyErr_Clear();
      return false;
    }
    PyList_SET_ITEM(look.held.get(), static_cast<Py_ssize_t>(r), grad);
    grads[r] = {nullptr, Codec::kFloat32, 0};
    if (grad == Py_None) {
      look.absent.push_back(static_cast<int64_t>(r));
      continue;
    }
    if (frozen || row.kind == RowKind::kAwaitsState) return false;
    if (!read_grad(row, grad, &grads[r])) look.odd.push_back(static_cast<int64_t>(r));
  }
  return true;
}

}  // namespace fusedopt
