// SPDX-License-Identifier: Apache-2.0
//
// What every operator of the emulated device needs: the memory of an NPU tensor seen as a CPU tensor,
// the point at which that memory may be read, and memory for results.
//
// An operator runs in the thread that calls it. It opens a HostScope, which waits until everything that was
// put on the device's current stream before it has happened; then it computes with CPU tensors on the same
// memory. Work that is put on the stream later therefore finds the results in place.
//
//   at::Tensor twice(const at::Tensor& x) {
//     HostScope scope(x.device());
//     at::Tensor result = EmptyOnDevice(x.sizes(), x.scalar_type());
//     OnHost(result).copy_(OnHost(x)).mul_(2);
//     return result;
//   }
#pragma once

#include <ATen/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/ArrayRef.h>

#include <optional>

namespace ascend_emulator::aten {

inline bool IsOnDevice(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == c10::DeviceType::PrivateUse1;
}

/// The memory of an NPU tensor as a CPU tensor: same address, sizes, strides, offset and dtype; nothing is
/// copied and no stream is waited for. The result keeps the memory alive. It cannot be resized. A tensor that
/// is not on the device, or is undefined, is returned as it is.
at::Tensor OnHost(const at::Tensor& tensor);

/// OnHost for an optional tensor; nullopt and undefined become nullopt.
std::optional<at::Tensor> OnHost(const std::optional<at::Tensor>& tensor);

/// An NPU tensor on the current device, contiguous, from torch_npu's caching allocator; its content is
/// undefined. Raises torch's out-of-memory error when the device's budget is spent.
at::Tensor EmptyOnDevice(c10::IntArrayRef sizes, c10::ScalarType dtype);

/// An NPU tensor on the current device with the content of a CPU tensor of any strides.
/// Strides are kept where the tensor is dense, otherwise the result is contiguous.
at::Tensor ToDevice(const at::Tensor& host);

/// Calls `visit(const at::Tensor&)` for each tensor in an operator's argument: a tensor, an optional one or a
/// list.
template <typename Visit>
void ForEachTensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      if (tensor.has_value()) visit(*tensor);
    }
  }
}

/// Wait until the current stream of the current device has nothing left to do, torch_npu's task queue
/// included. Raises what torch_npu raises if a task on the stream failed.
void WaitForCurrentStream();

/// While it lives: `device` is the current device, calls of ATen skip autograd, and what was on the device's
/// current stream at construction is done.
class HostScope {
 public:
  explicit HostScope(c10::Device device) : guard_(device) { WaitForCurrentStream(); }

 private:
  c10::DeviceGuard guard_;
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
};

}  // namespace ascend_emulator::aten
