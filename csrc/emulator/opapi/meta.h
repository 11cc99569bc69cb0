// SPDX-License-Identifier: Apache-2.0
//
// What the operators of libopapi take: descriptions of arguments that torch_npu makes one by one and destroys
// again. The wheel has no header of CANN for them; the signatures are those by which torch_npu looks them up
// (op_plugin/utils/op_api_common_base.h).
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <cstdint>
#include <vector>

/// A view of device memory. `offset` and `strides` are in elements; `data` is where the storage begins.
struct aclTensor {
  aclDataType type;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int64_t offset;
  void* data;
};

/// Bytes of one element; 0 for a type whose elements are not whole bytes, or that is not a number.
size_t ElementBytes(aclDataType type);

struct aclScalar {
  aclDataType type;
  /// The value as the type has it, at most eight bytes.
  uint64_t bits;
};

struct aclIntArray {
  std::vector<int64_t> values;
};
