// SPDX-License-Identifier: Apache-2.0
//
// npu_rms_norm and npu_add_rms_norm. They round at different places, as the kernels of 910B and 910C do:
// rms_norm once at the end; add_rms_norm the sum, then the normalised value, then the product with gamma. So
// the two may differ in the last bit for the same input. Source of the roundings: the kernels and test
// references of the project ops-nn.
#include <ATen/ops/add.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <c10/util/Exception.h>

#include <numeric>
#include <tuple>

#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kRmsNorm = "npu_rms_norm";
constexpr const char* kAddRmsNorm = "npu_add_rms_norm";

void RequireTrailingShape(const char* op, const at::Tensor& gamma, const at::Tensor& x) {
  const int64_t rank = gamma.dim();
  TORCH_CHECK(
      rank >= 1 && rank <= x.dim() && x.sizes().slice(static_cast<size_t>(x.dim() - rank)) == gamma.sizes(),
      op, ": gamma is ", Describe(gamma), "; its shape has to be that of the last dimensions of the input, ",
      Describe(x));
}

// 1/sqrt(mean of squares + epsilon) over the last `rank` dimensions, which stay with size 1.
at::Tensor InverseRms(const at::Tensor& x, int64_t rank, double epsilon) {
  std::vector<int64_t> dims(static_cast<size_t>(rank));
  std::iota(dims.begin(), dims.end(), -rank);
  return at::mean(x.square(), dims, /*keepdim=*/true).add_(epsilon).rsqrt_();
}

at::Tensor StoreOnDevice(const at::Tensor& host, c10::ScalarType dtype) {
  at::Tensor result = EmptyOnDevice(host.sizes(), dtype);
  OnHost(result).copy_(host);
  return result;
}

// Returns y like the input and the inverse root mean square in float32.
std::tuple<at::Tensor, at::Tensor> RmsNorm(const at::Tensor& input, const at::Tensor& gamma, double epsilon) {
  RequireDtype({kRmsNorm, "input", input}, {at::kHalf, at::kBFloat16, at::kFloat});
  if (gamma.scalar_type() != at::kFloat)
    RequireSameDtype({kRmsNorm, "gamma", gamma}, {kRmsNorm, "input", input});
  RequireOnDevice({kRmsNorm, "gamma", gamma});
  RequireTrailingShape(kRmsNorm, gamma, input);
  const HostScope scope(input.device());
  const at::Tensor x = OnHost(input).to(at::kFloat);
  const at::Tensor rstd = InverseRms(x, gamma.dim(), epsilon);
  return {StoreOnDevice(x.mul(rstd).mul_(OnHost(gamma)), input.scalar_type()),
          StoreOnDevice(rstd, at::kFloat)};
}

// Returns y, the inverse root mean square in float32, and x1 + x2; the arguments keep their values.
std::tuple<at::Tensor, at::Tensor, at::Tensor> AddRmsNorm(const at::Tensor& x1, const at::Tensor& x2,
                                                          const at::Tensor& gamma, double epsilon) {
  const Argument first{kAddRmsNorm, "x1", x1};
  RequireDtype(first, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireSameDtype({kAddRmsNorm, "x2", x2}, first);
  RequireSameDtype({kAddRmsNorm, "gamma", gamma}, first);
  TORCH_CHECK(x1.sizes() == x2.sizes(), kAddRmsNorm, ": x1 is ", Describe(x1), " and x2 is ", Describe(x2),
              "; both have to have the same shape");
  RequireTrailingShape(kAddRmsNorm, gamma, x1);
  const HostScope scope(x1.device());
  const c10::ScalarType dtype = x1.scalar_type();
  const at::Tensor sum = at::add(OnHost(x1), OnHost(x2));
  const at::Tensor rounded_sum = sum.to(at::kFloat);
  const at::Tensor rstd = InverseRms(rounded_sum, gamma.dim(), epsilon);
  const at::Tensor normalised = rounded_sum.mul(rstd).to(dtype);
  return {StoreOnDevice(normalised.mul(OnHost(gamma)), dtype), StoreOnDevice(rstd, at::kFloat),
          StoreOnDevice(sum, dtype)};
}

}  // namespace

void RegisterNorm(Operators& npu) {
  npu.Implement(kRmsNorm, TORCH_FN(RmsNorm));
  npu.Implement(kAddRmsNorm, TORCH_FN(AddRmsNorm));
}

}  // namespace ascend_emulator::aten
