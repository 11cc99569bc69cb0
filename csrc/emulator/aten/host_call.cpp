// SPDX-License-Identifier: Apache-2.0
//
// NPU tensors that share a storage must share one on the host too: the CPU kernels look at it to refuse
// overlapping operands, and a result that lies in it is a view of an argument and not new memory.
//
// A CPU kernel may resize what it writes. Host storages can therefore grow, into CPU memory; the NPU tensor
// follows afterwards and takes the content over.
#include "host_call.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>
#include <utility>

#include "generator.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr auto kCpu = c10::DeviceType::CPU;
constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// Scalars may come from anywhere; every kernel reads them.
bool IsScalar(const at::Tensor& tensor) { return tensor.dim() == 0; }

}  // namespace

HostCall::HostCall(const c10::OperatorHandle& op, const Signature& signature, torch::jit::Stack* stack)
    : op_(op),
      signature_(signature),
      stack_(stack),
      first_argument_(stack->size() - signature.arguments.size()) {}

void HostCall::Run() {
  FindDevice();
  const HostScope scope(device_);

  // The CPU kernel takes the arguments off the stack; these are needed after it.
  c10::SmallVector<c10::IValue, 4> handed_back;
  for (const std::optional<size_t>& argument : signature_.returned_argument) {
    handed_back.push_back(argument ? (*stack_)[first_argument_ + *argument] : c10::IValue());
  }
  for (size_t i = 0; i < signature_.arguments.size(); ++i) {
    c10::IValue& value = (*stack_)[first_argument_ + i];
    value = ToHost(value, signature_.arguments[i]);
  }

  op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);

  for (const Seen& seen : seen_) {
    if (seen.written) WriteBack(seen);
  }
  for (size_t i = 0; i < handed_back.size(); ++i) {
    c10::IValue& value = (*stack_)[first_argument_ + i];
    value = signature_.returned_argument[i] ? std::move(handed_back[i]) : ToResult(value);
  }
}

// An explicit device wins over that of the tensors: factories such as full_like may name another one.
void HostCall::FindDevice() {
  std::optional<c10::Device> asked;
  for (size_t i = 0; i < signature_.arguments.size(); ++i) {
    const c10::IValue& value = (*stack_)[first_argument_ + i];
    switch (signature_.arguments[i].passing) {
      case Passing::kTensors:
        ForEachTensor(value, [this](const at::Tensor& tensor) { FindDevice(tensor); });
        break;
      case Passing::kDevice:
        if (value.isDevice()) asked = value.toDevice();
        break;
      case Passing::kPinMemory:
        TORCH_CHECK(!value.isBool() || !value.toBool(), "Only dense CPU tensors can be pinned");
        break;
      case Passing::kAsIs:
      case Passing::kGenerator:
        break;
    }
  }
  TORCH_CHECK(!host_tensors_ || !device_.has_index() || signature_.takes_host_tensors,
              "Expected all tensors to be on the same device, but found at least two devices, ", device_,
              " and cpu! (when checking arguments of ", op_.operator_name(), ")");
  if (asked && asked->type() == kCpu) results_on_host_ = true;
  if (asked && asked->type() == kNpu) device_ = *asked;
  if (!device_.has_index()) device_ = c10::impl::VirtualGuardImpl(kNpu).getDevice();
}

void HostCall::FindDevice(const at::Tensor& tensor) {
  if (!tensor.defined()) return;
  if (tensor.device().type() != kNpu) {
    host_tensors_ = host_tensors_ || !IsScalar(tensor);
    return;
  }
  if (!device_.has_index()) device_ = tensor.device();
  TORCH_CHECK(tensor.device() == device_,
              "Expected all tensors to be on the same device, but found at least two devices, ", device_,
              " and ", tensor.device(), "! (when checking arguments of ", op_.operator_name(), ")");
}

c10::IValue HostCall::ToHost(const c10::IValue& value, const Signature::Argument& argument) {
  switch (argument.passing) {
    case Passing::kTensors:
      break;
    case Passing::kGenerator:
      return DrawHostGenerator(value.toOptional<at::Generator>());
    case Passing::kDevice:
      return c10::Device(kCpu);
    case Passing::kPinMemory:
      return c10::IValue();
    case Passing::kAsIs:
      return value;
  }
  if (value.isTensor()) return ToHost(value.toTensor(), argument.written);
  if (value.isTensorList()) {
    c10::List<at::Tensor> host;
    for (const at::Tensor& tensor : value.toTensorVector()) host.push_back(ToHost(tensor, argument.written));
    return host;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> host;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      host.push_back(tensor ? std::make_optional(ToHost(*tensor, argument.written)) : std::nullopt);
    }
    return host;
  }
  return value;
}

at::Tensor HostCall::ToHost(const at::Tensor& tensor, bool written) {
  if (!IsOnDevice(tensor)) return tensor;
  for (Seen& seen : seen_) {
    if (!seen.device.is_same(tensor)) continue;
    seen.written = seen.written || written;
    return seen.host;
  }
  at::Tensor host = at::detail::make_tensor<c10::TensorImpl>(
      HostStorage(tensor), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                    tensor.storage_offset());
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  seen_.push_back({tensor, host, written});
  return host;
}

c10::Storage HostCall::HostStorage(const at::Tensor& tensor) const {
  for (const Seen& seen : seen_) {
    if (seen.device.storage().is_alias_of(tensor.storage())) return seen.host.storage();
  }
  const c10::Storage& memory = tensor.storage();
  return c10::Storage(c10::Storage::use_byte_size_t(), memory.nbytes(),
                      c10::DataPtr(memory.mutable_data(), c10::Device(kCpu)), c10::GetCPUAllocator(),
                      /*resizable=*/true);
}

void HostCall::WriteBack(const Seen& seen) {
  const bool moved = seen.host.storage().data() != seen.device.storage().data();
  if (!moved && seen.host.sizes() == seen.device.sizes() && seen.host.strides() == seen.device.strides())
    return;
  seen.device.resize_(seen.host.sizes());
  if (seen.device.strides() != seen.host.strides()) {
    seen.device.unsafeGetTensorImpl()->set_sizes_and_strides(seen.host.sizes(), seen.host.strides());
  }
  if (!moved) return;
  // Growing put a copy of the old content on the stream; it must not land on the new one.
  WaitForCurrentStream();
  OnHost(seen.device).copy_(seen.host);
}

c10::IValue HostCall::ToResult(const c10::IValue& value) const {
  if (value.isTensor()) return ToResult(value.toTensor());
  if (!value.isTensorList()) return value;
  c10::List<at::Tensor> results;
  for (const at::Tensor& host : value.toTensorVector()) results.push_back(ToResult(host));
  return results;
}

at::Tensor HostCall::ToResult(const at::Tensor& host) const {
  if (!host.defined()) return host;
  TORCH_CHECK_NOT_IMPLEMENTED(host.layout() == c10::kStrided && !host.is_quantized(), op_.operator_name(),
                              " gives a tensor that is not dense; the emulated device has none");
  for (const Seen& seen : seen_) {
    if (seen.host.is_same(host)) return seen.device;
    if (!seen.host.storage().is_alias_of(host.storage())) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(seen.host.dtype() == host.dtype(), op_.operator_name(),
                                " gives a view of another dtype; this is not emulated");
    return seen.device.as_strided(host.sizes(), host.strides(), host.storage_offset());
  }
  return results_on_host_ ? host : ToDevice(host);
}

}  // namespace ascend_emulator::aten
