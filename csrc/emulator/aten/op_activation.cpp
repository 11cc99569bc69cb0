// SPDX-License-Identifier: Apache-2.0
//
// npu_swiglu, the gated activation of Llama-like models, and npu_clipped_swiglu, a variant with limits. Both
// compute in float32 and round once.
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <c10/core/WrapDimMinimal.h>
#include <c10/util/Exception.h>

#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kSwiglu = "npu_swiglu";
constexpr const char* kClippedSwiglu = "npu_clipped_swiglu";

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

// a * sigmoid(alpha * a) * (b + bias), where a is cut off above `limit` and b at both sides. They are the
// even and the odd places of the last dimension if `interleaved`, and its halves otherwise.
at::Tensor ClippedSwiglu(const at::Tensor& x, const std::optional<at::Tensor>& group_index, int64_t dim,
                         double alpha, double limit, double bias, bool interleaved) {
  RequireDtype({kClippedSwiglu, "x", x}, {at::kHalf, at::kBFloat16, at::kFloat});
  TORCH_CHECK(x.dim() > 0 && x.size(-1) % 2 == 0, kClippedSwiglu, ": x is ", Describe(x),
              "; its last size has to be even");
  TORCH_CHECK_NOT_IMPLEMENTED(c10::maybe_wrap_dim(dim, x.dim()) == x.dim() - 1, kClippedSwiglu, ": dim is ",
                              dim, "; the last dimension is emulated");
  TORCH_CHECK_NOT_IMPLEMENTED(!group_index.has_value() || !group_index->defined(), kClippedSwiglu,
                              ": the argument group_index is not emulated; leave it None");
  const HostScope scope(x.device());
  const at::Tensor wide = OnHost(x).to(at::kFloat);
  const at::Tensor pairs =
      interleaved ? wide.unflatten(-1, {-1, 2}) : wide.unflatten(-1, {2, -1}).transpose(-1, -2);
  const at::Tensor a = pairs.select(-1, 0).clamp_max(limit);
  const at::Tensor b = pairs.select(-1, 1).clamp(-limit, limit);
  return ToDevice(a.mul(at::sigmoid(a.mul(alpha))).mul_(b.add(bias)).to(x.scalar_type()));
}

}  // namespace

void RegisterActivation(Operators& npu) {
  npu.Implement(kSwiglu, TORCH_FN(Swiglu));
  npu.Implement(kClippedSwiglu, TORCH_FN(ClippedSwiglu));
}

}  // namespace ascend_emulator::aten
