// SPDX-License-Identifier: Apache-2.0
//
// What torch_npu's operators require of their tensors, said in one way: operator, argument, what was given,
// what it has to be. Each function raises RuntimeError (in Python) unless the tensor is as its name says.
#pragma once

#include <ATen/Tensor.h>
#include <c10/core/ScalarType.h>

#include <initializer_list>
#include <string>

namespace ascend_emulator::aten {

/// An argument of an operator, as error messages name it.
struct Argument {
  const char* op;
  const char* name;
  const at::Tensor& tensor;
};

/// "bfloat16[3, 8, 128] on npu:0"
std::string Describe(const at::Tensor& tensor);

/// True where the launcher was told --allow-fp32 (ASCEND_EMULATOR_ALLOW_FP32=1): operators for which cards
/// take float16 and bfloat16 alone take float32 too, so that a test can compare without rounding.
bool Float32Allowed();

void RequireOnDevice(const Argument& argument);
void RequireRank(const Argument& argument, int64_t rank);
void RequireContiguous(const Argument& argument);

/// On the device, and of one of `dtypes`.
void RequireDtype(const Argument& argument, std::initializer_list<c10::ScalarType> dtypes);

/// On the device, and float16 or bfloat16; float32 where Float32Allowed().
void RequireHalf(const Argument& argument);

/// On the device, and of the dtype of `other`.
void RequireSameDtype(const Argument& argument, const Argument& other);

}  // namespace ascend_emulator::aten
