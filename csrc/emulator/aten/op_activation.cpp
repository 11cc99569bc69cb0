// SPDX-License-Identifier: Apache-2.0
//
// npu_swiglu: the gated activation of Llama-like models.
#include <ATen/ops/silu.h>
#include <c10/core/WrapDimMinimal.h>
#include <c10/util/Exception.h>

#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kSwiglu = "npu_swiglu";

// silu(first half) * second half along `dim`; float32 inside, rounded once.
// An odd size is refused although torch_npu's shape function lets it pass.
at::Tensor Swiglu(const at::Tensor& input, int64_t dim) {
  RequireDtype({kSwiglu, "input", input}, {at::kHalf, at::kBFloat16, at::kFloat});
  TORCH_CHECK(input.dim() > 0, kSwiglu, ": input is ", Describe(input), "; it needs a dimension to split");
  const int64_t axis = c10::maybe_wrap_dim(dim, input.dim());
  TORCH_CHECK(input.size(axis) % 2 == 0, kSwiglu, ": input is ", Describe(input),
              " and is split along dimension ", axis, "; that size has to be even");
  const HostScope scope(input.device());
  const auto halves = OnHost(input).to(at::kFloat).chunk(2, axis);
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes[static_cast<size_t>(axis)] /= 2;
  at::Tensor result = EmptyOnDevice(sizes, input.scalar_type());
  if (result.numel() > 0) OnHost(result).copy_(at::silu(halves[0]).mul_(halves[1]));
  return result;
}

}  // namespace

void RegisterActivation(Operators& npu) { npu.Implement(kSwiglu, TORCH_FN(Swiglu)); }

}  // namespace ascend_emulator::aten
