// Reading and making torch tensors from C++ without torch's headers, in a tenth of the time Python takes for it.
//
// torch (2.10 and newer) offers a table of C functions for this, DLPack's exchange API: a capsule on its Tensor class
// (https://dmlc.github.io/dlpack/latest, "C Exchange API"). The structs below are DLPack 1's ABI. Where there is no such
// table, Python does the same more slowly.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace ff {

struct DLDevice {
  int32_t type, id;  // type 1 is the CPU
};
struct DLDataType {
  uint8_t code, bits;  // code 2: IEEE float, 4: bfloat16
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned;
struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*object_from_managed)(DLManagedTensorVersioned* tensor, void** object);
  int (*view_of_object)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

inline const DLPackExchangeAPI* exchange = nullptr;

// Takes the capsule of torch.Tensor.__dlpack_c_exchange_api__; false if it is of a version this code does not know.
inline bool use_exchange(const pybind11::object& capsule) {
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw pybind11::error_already_set();
  while (api && api->major != 1) api = api->previous;
  if (!api || !api->view_of_object) return false;
  exchange = api;
  return true;
}

// The ff_dtype of a tensor, or -1.
inline int dtype_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == 4 && t.dtype.bits == 16) return FF_BFLOAT16;
  if (t.dtype.code != 2) return -1;
  return t.dtype.bits == 32 ? FF_FLOAT32 : t.dtype.bits == 64 ? FF_FLOAT64 : t.dtype.bits == 16 ? FF_FLOAT16 : -1;
}

// An uninitialised contiguous tensor with the dtype and device of `like`; its memory in `data`.
inline pybind11::object new_tensor(const DLTensor& like, int64_t* shape, int32_t ndim, void** data) {
  DLTensor prototype = like;
  prototype.shape = shape, prototype.ndim = ndim, prototype.strides = nullptr, prototype.byte_offset = 0;
  DLManagedTensorVersioned* made = nullptr;
  auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
  void* object = nullptr;
  if (exchange->allocate(&prototype, &made, nullptr, set_error) || exchange->object_from_managed(made, &object))
    throw pybind11::error_already_set();
  auto result = pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object));
  DLTensor view;
  if (exchange->view_of_object(object, &view)) throw pybind11::error_already_set();
  *data = static_cast<char*>(view.data) + view.byte_offset;
  return result;
}

}  // namespace ff
