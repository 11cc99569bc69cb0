// SPDX-License-Identifier: Apache-2.0
//
// The casts that torch_npu itself calls, for example before a collective over bool tensors.
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

at::Tensor CastTo(const at::Tensor& input, c10::ScalarType dtype) {
  const HostScope scope(input.device());
  at::Tensor result = at::empty_like(input, input.options().dtype(dtype));
  OnHost(result).copy_(OnHost(input));
  return result;
}

// `dtype` is a number of c10::ScalarType; torch_npu numbers the types that PyTorch lacks from 256 on.
at::Tensor CastToNumber(const at::Tensor& input, int64_t dtype, std::optional<int64_t> input_dtype) {
  constexpr auto kNumTypes = static_cast<int64_t>(c10::ScalarType::NumOptions);
  TORCH_CHECK(dtype >= 0 && dtype < kNumTypes && !input_dtype.has_value(), "npu_dtype_cast: dtype number ",
              dtype, input_dtype ? " with an input_dtype" : "",
              "; the emulator casts between PyTorch's own dtypes only");
  return CastTo(input, static_cast<c10::ScalarType>(dtype));
}

at::Tensor& CastInto(at::Tensor& input, const at::Tensor& src) {
  const HostScope scope(input.device());
  OnHost(input).copy_(OnHost(src));
  return input;
}

}  // namespace

void RegisterCast(Operators& npu) {
  npu.Implement("_npu_dtype_cast", TORCH_FN(CastTo));
  npu.Implement("npu_dtype_cast", TORCH_FN(CastToNumber));
  npu.Implement("npu_dtype_cast_", TORCH_FN(CastInto));
}

}  // namespace ascend_emulator::aten
