// Reading torch's tensors without torch's headers.
//
// torch (2.10 and newer) offers a table of C functions for this, DLPack's exchange API: a capsule on its Tensor class
// (https://dmlc.github.io/dlpack/latest, "C Exchange API"). A small call has twenty sizes, strides and addresses: through
// the table they take less time than one attribute read in Python. The structs below are DLPack 1's ABI. Where there is
// no such table, the attributes are read.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../include/fastformer.h"

namespace ff {

struct DLDevice {
  int32_t type, id;
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

// Whether tensors are read through torch's table from here on: it has to be there and wanted.
inline bool use_exchange(bool wanted) {
  exchange = nullptr;
  const auto tensor = pybind11::module_::import("torch").attr("Tensor");
  if (!wanted || !pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  const pybind11::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw pybind11::error_already_set();
  while (api && api->major != 1) api = api->previous;
  if (api && api->view_of_object) exchange = api;
  return exchange != nullptr;
}

// A tensor, or None: then `data` is null.
struct Tensor {
  static constexpr int kMostDims = 4;  // of more dimensions, the first four
  char* data = nullptr;
  int ndim = 0;
  int dtype = -1;  // ff_dtype, -1 for any other
  bool is_int64 = false, on_cpu = false, contiguous = false;  // known only where torch has the table
  int64_t shape[kMostDims] = {}, stride[kMostDims] = {};
  int64_t numel = 1, cols = 1;  // cols: the last dimension

  Tensor(pybind11::handle t) {  // NOLINT: implicit, as arguments of the bindings come
    if (t.is_none()) return;
    exchange ? read_table(t) : read_attributes(t);
  }

  // As the rows a kernel walks over: the tensor is contiguous, or two-dimensional with contiguous rows at any distance.
  int64_t rows() const { return cols ? numel / cols : 0; }
  int64_t row_stride() const { return ndim == 2 ? stride[0] : cols; }

  template <class T> T* as() const { return reinterpret_cast<T*>(data); }
  template <size_t N> void strides_to(int64_t (&to)[N]) const {
    for (size_t d = 0; d < N; d++) to[d] = stride[d];
  }
  // Those of a tensor with contiguous rows, broadcast to a larger shape: 0 where it has one element.
  void broadcast_strides_to(int64_t (&to)[4]) const {
    for (int d = 0; d < 3; d++) to[d] = shape[d] == 1 ? 0 : stride[d];
    to[3] = 1;
  }

private:
  void add_dimension(int d, int64_t size, int64_t distance) {
    if (d < kMostDims) shape[d] = size, stride[d] = distance;
    numel *= size, cols = size;
  }
  void read_table(pybind11::handle t) {
    DLTensor view;
    if (exchange->view_of_object(t.ptr(), &view)) throw pybind11::error_already_set();
    data = static_cast<char*>(view.data) + view.byte_offset;
    ndim = view.ndim;
    for (int d = 0; d < ndim; d++) add_dimension(d, view.shape[d], view.strides[d]);
    on_cpu = view.device.type == 1, contiguous = true;
    int64_t distance = 1;
    for (int d = ndim; d-- > 0; distance *= view.shape[d])
      if (view.shape[d] != 1 && view.strides[d] != distance) contiguous = false;
    const int bits = view.dtype.bits;
    if (view.dtype.lanes != 1) return;
    is_int64 = view.dtype.code == 0 && bits == 64;
    if (view.dtype.code == 4 && bits == 16) dtype = FF_BFLOAT16;
    if (view.dtype.code == 2)
      dtype = bits == 32 ? FF_FLOAT32 : bits == 64 ? FF_FLOAT64 : bits == 16 ? FF_FLOAT16 : -1;
  }
  void read_attributes(pybind11::handle t) {
    data = reinterpret_cast<char*>(t.attr("data_ptr")().cast<uintptr_t>());
    const pybind11::tuple sizes = t.attr("shape"), strides = t.attr("stride")();
    ndim = int(sizes.size());
    for (int d = 0; d < ndim; d++) add_dimension(d, sizes[d].cast<int64_t>(), strides[d].cast<int64_t>());
    const auto name = pybind11::str(t.attr("dtype")).cast<std::string>();
    if (name == "torch.float32") dtype = FF_FLOAT32;
    if (name == "torch.float64") dtype = FF_FLOAT64;
    if (name == "torch.float16") dtype = FF_FLOAT16;
    if (name == "torch.bfloat16") dtype = FF_BFLOAT16;
  }
};

}  // namespace ff
