// SPDX-License-Identifier: Apache-2.0
//
// libopapi: making and destroying the descriptions of arguments (meta.h).
//
// torch_npu's C++ code calls a few operators directly, past PyTorch's dispatcher, where the emulator's
// kernels are. Those come here, as on a card. Any other aclnn operator is absent: torch_npu then raises with
// its name.
#include "opapi/meta.h"

#include <cstring>

size_t ElementBytes(aclDataType type) {
  switch (type) {
    case ACL_BOOL:
    case ACL_INT8:
    case ACL_UINT8:
      return 1;
    case ACL_INT16:
    case ACL_UINT16:
    case ACL_FLOAT16:
    case ACL_BF16:
      return 2;
    case ACL_INT32:
    case ACL_UINT32:
    case ACL_FLOAT:
      return 4;
    case ACL_INT64:
    case ACL_UINT64:
    case ACL_DOUBLE:
    case ACL_COMPLEX64:
      return 8;
    case ACL_COMPLEX128:
      return 16;
    default:
      return 0;
  }
}

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t num_dims, aclDataType type, const int64_t* strides,
                           int64_t offset, aclFormat, const int64_t*, uint64_t, void* data) {
  return new aclTensor{type, {sizes, sizes + num_dims}, {strides, strides + num_dims}, offset, data};
}

aclScalar* aclCreateScalar(void* value, aclDataType type) {
  const size_t bytes = ElementBytes(type);
  if (value == nullptr || bytes == 0 || bytes > sizeof(uint64_t)) return nullptr;
  auto* scalar = new aclScalar{type, 0};
  std::memcpy(&scalar->bits, value, bytes);
  return scalar;
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{{values, values + size}};
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return 0;
}

int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return 0;
}

int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return 0;
}

}  // extern "C"
