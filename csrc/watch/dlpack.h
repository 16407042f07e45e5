// The part of the DLPack 1.x C exchange ABI that we call (dmlc.github.io/dlpack): struct layouts
// only. dltensor_from_py_object fills in a view of a tensor without taking a reference.
#pragma once

#include <cstdint>

namespace fusedopt::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* manager;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocator;
  int (*managed_from_py_object)(void* object, ManagedTensor** out);
  void* managed_to_py_object;
  int (*dltensor_from_py_object)(void* object, Tensor* out);
  void* current_work_stream;
};

constexpr uint8_t kFloat = 2;  // a type code; those of 16-bit dtypes are in ../codecs.h

}  // namespace fusedopt::dlpack
