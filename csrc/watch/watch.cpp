#include "watch.h"

#include <structmember.h>

#include <algorithm>

#include "../check.h"
#include "dlpack.h"

namespace fusedopt {
namespace {

struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* disable_subclasses = nullptr;
  const PyGetSetDef* grad = nullptr;  // of torch.Tensor; null: look it up by name
} torch;

PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  FUSEDOPT_CHECK(name, "out of memory");
  return name;
}

// The C getter of a type's attribute; null if there is none.
const PyGetSetDef* getset_named(py::handle type, const char* name) {
  const py::object attribute = py::getattr(type, name, py::none());
  if (Py_TYPE(attribute.ptr()) != &PyGetSetDescr_Type) return nullptr;
  return reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr())->d_getset;  // static in torch
}

// False for anything that is not a strided tensor (sparse, a functional wrapper, not a tensor).
bool view(PyObject* object, dlpack::Tensor& out) {
  const bool strided = torch.exchange->dltensor_from_py_object(object, &out) == 0;
  if (!strided) PyErr_Clear();
  return strided;
}

// No subclass: it may keep its values elsewhere, and the exchange does not show that.
bool plain_tensor(PyObject* object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type || type == torch.parameter_type;
}

// Whether it is a lazily negated view; the exchange does not show that either. Such views come from
// the imaginary part of a conjugate. They have a stride of two, so only one of a single element can
// look dense.
bool negated(PyObject* tensor) {
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch.is_neg, &tensor, 1, nullptr));
  if (!answer) PyErr_Clear();
  return answer.ptr() != Py_False;
}

// New reference, or null with an error set. For types that leave `.grad` to torch the attribute's C
// getter is called, which saves the lookup by name.
PyObject* grad_of(PyObject* param, bool torchs_own) {
  static PyObject* const kGrad = interned("grad");
  if (torch.grad && torchs_own) return torch.grad->get(param, torch.grad->closure);
  return PyObject_GetAttr(param, kGrad);
}

// While it lives, torch does not search a DTensor for a `__torch_function__` of its own before it
// reads `.grad`. DTensor has none, and the search takes as long as the read.
class WithoutSubclasses {
 public:
  explicit WithoutSubclasses(bool wanted) {
    if (!wanted) return;
    guard_ = py::reinterpret_borrow<py::object>(torch.disable_subclasses)();
    guard_.attr("__enter__")();
  }
  WithoutSubclasses(const WithoutSubclasses&) = delete;
  WithoutSubclasses& operator=(const WithoutSubclasses&) = delete;
  ~WithoutSubclasses() {
    if (!guard_) return;
    PyObject* const none = Py_None;
    Py_XDECREF(PyObject_CallMethod(guard_.ptr(), "__exit__", "OOO", none, none, none));
    PyErr_Clear();
  }

 private:
  py::object guard_;
};

const void* address(const dlpack::Tensor& t) {
  return static_cast<const char*>(t.data) + t.byte_offset;
}

// False for a dtype that no kernel reads.
bool kernel_codec(const dlpack::Tensor& t, Codec& codec) {
  bool found = t.dtype_bits == 32 && t.dtype_code == dlpack::kFloat;
  if (found) codec = Codec::kFloat32;
  HalfCodecs::for_each([&](auto half) {
    if (t.dtype_bits != 16 || t.dtype_code != half.kTypeCode) return;
    codec = half.kCodec;
    found = true;
  });
  return found;
}

// The records of a thousand tensors do not fit in a cache, and reading one is a chain of dependent
// cache misses. So the cache lines of the tensors are prefetched this many rows ahead.
constexpr size_t kAhead = 8;

// Limits of tensors with a second owner: see SecondOwner.
constexpr int64_t kSmall = 4 << 10;       // bytes of one: a page; freed, it stays with the process
constexpr int64_t kSmallInAll = 8 << 20;  // bytes

// Prefetches the Python object, and torch's record around the sizes that the exchange showed.
void fetch(const void* object, const void* record) {
  __builtin_prefetch(object);
  const auto middle = reinterpret_cast<uintptr_t>(record);  // a hint: null and stale are allowed
  for (uintptr_t at = middle - 128; at != middle + 192; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(at));
  }
}

py::object borrowed(py::handle object) { return py::reinterpret_borrow<py::object>(object); }

// A borrowed reference; null when the group has no sequence of params.
PyObject* params_of(PyObject* group) {
  static PyObject* const kParams = interned("params");
  if (!PyDict_Check(group)) return nullptr;
  PyObject* params = PyDict_GetItem(group, kParams);
  return params && (PyList_Check(params) || PyTuple_Check(params)) ? params : nullptr;
}

int64_t numel(const Placement& placement) {
  int64_t n = 1;
  for (int32_t d = 0; d < placement.ndim; ++d) n *= placement.shape[d];
  return n;
}

// A dimension of one element may carry any stride.
bool same_layout(const Placement& placement, const dlpack::Tensor& t) {
  if (t.ndim != placement.ndim) return false;
  const int64_t* shape = placement.shape;
  const int64_t* strides = shape + t.ndim;
  for (int32_t d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != shape[d] || (shape[d] > 1 && t.strides[d] != strides[d])) return false;
  }
  return true;
}

bool in_place(const Placement& placement, PyObject* object) {
  dlpack::Tensor t;
  return view(object, t) && address(t) == placement.data && t.dtype_code == placement.dtype_code &&
         t.dtype_bits == placement.dtype_bits && t.device_type == placement.device_type &&
         t.device_id == placement.device_id && same_layout(placement, t);
}

// Null if torch does not export the tensor: the watch is then slower, not wrong.
SecondOwner second_owner(PyObject* tensor) {
  dlpack::ManagedTensor* managed = nullptr;
  if (torch.exchange->managed_from_py_object(tensor, &managed) == 0) return SecondOwner(managed);
  PyErr_Clear();
  return nullptr;
}

}  // namespace

void use_torch(const py::object& tensor_type, const py::object& parameter_type,
               const py::object& is_neg, const py::object& disable_subclasses,
               const py::object& exchange) {
  constexpr const char* kCapsule = "dlpack_exchange_api";
  FUSEDOPT_CHECK(PyCapsule_IsValid(exchange.ptr(), kCapsule),
                 "torch's __dlpack_c_exchange_api__ is not a ", kCapsule, " capsule");
  auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), kCapsule));
  while (api && api->version.major != 1) api = api->previous;
  FUSEDOPT_CHECK(api && api->dltensor_from_py_object,
                 "this torch offers no DLPack 1.x C exchange; use torch 2.11 or newer");
  // These references are never released: the module lives as long as the process.
  torch = {api,
           tensor_type.inc_ref().ptr(),
           parameter_type.inc_ref().ptr(),
           is_neg.inc_ref().ptr(),
           disable_subclasses.inc_ref().ptr(),
           getset_named(tensor_type, "grad")};
}

Watch::Slot::Slot(const py::object& type, const char* name) : name_(name) {
  const py::object found = py::getattr(type, name, py::none());
  if (Py_TYPE(found.ptr()) != &PyMemberDescr_Type) return;
  const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
  if (member->type == T_OBJECT_EX) offset_ = member->offset;
}

py::object Watch::Slot::of(PyObject* object) const {
  if (offset_ > 0) {
    auto* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
    return borrowed(value ? value : Py_None);
  }
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name_.ptr()));
  if (value) return value;
  PyErr_Clear();
  return py::none();
}

bool Watch::is_dtensor(PyObject* object) const {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == dtensor_.ptr();
}

Part Watch::part_of(PyObject* object) const {
  if (!is_dtensor(object)) return {object};
  py::object local = local_.of(object);
  return {local.ptr(), local};
}

// A DTensor's mesh and placements are those of the plan; a plain tensor has none.
bool Watch::same_spec(const WatchedRow& row, PyObject* tensor) const {
  if (!row.spec) return !is_dtensor(tensor);
  return is_dtensor(tensor) && spec_.of(tensor).is(row.spec);
}

Placement Watch::place(py::handle object) {
  dlpack::Tensor t;
  if (!view(object.ptr(), t)) return {};
  std::vector<int64_t> layout(t.shape, t.shape + t.ndim);
  layout.insert(layout.end(), t.strides, t.strides + t.ndim);
  const int64_t* shape = layouts_.insert(std::move(layout)).first->data();
  return {t.shape, address(t),   shape,        t.device_type, t.device_id,
          t.ndim,  t.dtype_code, t.dtype_bits, true};
}

Watch::Watch(const py::list& groups, const py::dict& state, const std::vector<int>& kinds,
             const py::object& dtensor)
    : dtensor_(dtensor),
      local_(dtensor, "_local_tensor"),
      spec_(dtensor, "_spec"),
      state_(state.ptr()) {
  FUSEDOPT_CHECK(torch.exchange, "use_torch() has not been called");
  for (const py::handle group : groups) {
    const size_t g = group_sizes_.size();
    PyObject* params = params_of(group.ptr());
    FUSEDOPT_CHECK(params, "param group ", g, " has no list of params");
    group_sizes_.push_back(PySequence_Fast_GET_SIZE(params));
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i) {
      FUSEDOPT_CHECK(rows_.size() < kinds.size(), "fewer row kinds than params");
      WatchedRow row;
      row.param = borrowed(PySequence_Fast_GET_ITEM(params, i));
      row.kind = static_cast<RowKind>(kinds[rows_.size()]);
      if (row.kind != RowKind::kFrozen) {
        row.placement = place(part_of(row.param.ptr()).tensor);
        FUSEDOPT_CHECK(row.placement.is_tensor, "param ", i, " of group ", g,
                       " is not a strided tensor");
        row.single_element = numel(row.placement) == 1;
      }
      if (is_dtensor(row.param.ptr())) row.spec = spec_.of(row.param.ptr());
      rows_.push_back(std::move(row));
    }
  }
  FUSEDOPT_CHECK(rows_.size() == kinds.size(), "more row kinds than params");
  only_sharded_ = std::all_of(rows_.begin(), rows_.end(),
                              [](const WatchedRow& row) { return static_cast<bool>(row.spec); });

  int64_t bytes_left = kSmallInAll;
  for (const auto& [key, value] : state) {
    const size_t first_item = items_.size();
    for (const auto& [name, item] :
         PyDict_Check(value.ptr()) ? py::reinterpret_borrow<py::dict>(value) : py::dict()) {
      const Part part = part_of(item.ptr());
      const Placement placement = place(part.tensor);
      const int64_t n_bytes = numel(placement) * placement.dtype_bits / 8;
      SecondOwner owner;
      if (placement.is_tensor && n_bytes <= kSmall && n_bytes <= bytes_left) {
        bytes_left -= n_bytes;
        owner = second_owner(part.tensor);
      }
      if (placement.is_tensor && !owner) ++n_held_;
      items_.push_back({borrowed(name), item.ptr(), placement, std::move(owner)});
    }
    entries_.push_back({borrowed(key), value.ptr(), first_item, items_.size() - first_item});
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
      if (PySequence_Fast_GET_ITEM(params, i) != rows_[r].param.ptr()) return false;
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
    if (key != entry.key.ptr() || value != entry.value) return false;
    if (!PyDict_Check(value)) {
      if (entry.n_items > 0) return false;  // another object has the address of a dict
      continue;
    }
    if (static_cast<size_t>(PyDict_Size(value)) != entry.n_items) return false;
    PyObject *name, *item;
    size_t i = entry.first_item;
    for (Py_ssize_t in = 0; PyDict_Next(value, &in, &name, &item); ++i) {
      const Item& watched = items_[i];
      if (name != watched.key.ptr() || item != watched.value) return false;
      if (!watched.placement.is_tensor) continue;
      const Part part = part_of(item);
      if (!in_place(watched.placement, part.tensor)) return false;
      if (watched.second_owner) continue;
      Py_INCREF(part.tensor);
      PyList_SET_ITEM(held, at_held++, part.tensor);
    }
  }
  return true;
}

void Watch::fetch_row(size_t r) const {
  if (r >= rows_.size()) return;
  const WatchedRow& row = rows_[r];
  fetch(row.param.ptr(), row.placement.fetch_ahead);
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

bool Watch::read_grad(const WatchedRow& row, PyObject* object, Grad* out) const {
  const Placement& like = row.placement;
  dlpack::Tensor t;
  if (!same_spec(row, object)) return false;
  const Part part = part_of(object);
  PyObject* const grad = part.tensor;
  if (row.kind == RowKind::kStaged || !plain_tensor(grad) || !view(grad, t)) return false;
  if (t.device_type != like.device_type || t.device_id != like.device_id) return false;
  if (!same_layout(like, t) || !kernel_codec(t, out->codec)) return false;
  if (row.single_element && negated(grad)) return false;
  if (!address(t) && like.data) return false;  // zeros that were never allocated
  out->data = address(t);
  out->present = 1;
  row.grad_object = object;
  row.grad_record = t.shape;
  return true;
}

py::object Watch::refresh(const py::object& groups, const py::object& state,
                          uintptr_t grads) const {
  FUSEDOPT_CHECK(grads != 0, "grads must not be null");
  py::list odd, absent, held(rows_.size() + n_held_);
  if (!same_groups(groups.ptr()) || !same_state(state.ptr(), held.ptr())) return py::none();
  const WithoutSubclasses without(only_sharded_);
  for (size_t r = 0; r < rows_.size(); ++r) {
    fetch_row(r + kAhead);
    const WatchedRow& row = rows_[r];
    PyObject* const param = row.param.ptr();
    const bool frozen = row.kind == RowKind::kFrozen;
    if (!frozen && !same_spec(row, param)) return py::none();
    const Part part = part_of(param);
    if (!frozen && !in_place(row.placement, part.tensor)) return py::none();
    if (row.single_element && row.kind != RowKind::kStaged && negated(part.tensor)) {
      return py::none();
    }
    PyObject* const grad = grad_of(param, row.spec || plain_tensor(param));
    if (!grad) {
      PyErr_Clear();
      return py::none();
    }
    PyList_SET_ITEM(held.ptr(), static_cast<Py_ssize_t>(r), grad);
    Grad* const out = reinterpret_cast<Grad*>(grads) + r;
    *out = {nullptr, Codec::kFloat32, 0};
    if (grad == Py_None) {
      absent.append(r);
      continue;
    }
    if (frozen || row.kind == RowKind::kAwaitsState) return py::none();
    if (!read_grad(row, grad, out)) odd.append(r);
  }
  return py::make_tuple(odd, absent, held);
}

}  // namespace fusedopt
