// SPDX-License-Identifier: Apache-2.0
//
// NPU memory is host memory on the emulated device, so a view of it is a storage with the same address.
#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <cstring>

#include "torch_npu/csrc/core/npu/NPUFunctions.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace ascend_emulator::aten {
namespace {

void ReleaseStorage(void* storage) {
  c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(storage));
}

c10::TensorOptions OnCurrentDevice(c10::ScalarType dtype) {
  return c10::TensorOptions(dtype).device(c10::DeviceType::PrivateUse1, c10_npu::current_device());
}

}  // namespace

at::Tensor OnHost(const at::Tensor& tensor) {
  if (!IsOnDevice(tensor)) return tensor;
  c10::StorageImpl* memory = tensor.storage().unsafeGetStorageImpl();
  c10::raw::intrusive_ptr::incref(memory);
  c10::DataPtr address(memory->mutable_data(), memory, ReleaseStorage, c10::Device(c10::DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), memory->nbytes(), std::move(address));
  at::Tensor host = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                    tensor.storage_offset());
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  return host;
}

std::optional<at::Tensor> OnHost(const std::optional<at::Tensor>& tensor) {
  if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
  return OnHost(*tensor);
}

at::Tensor EmptyOnDevice(c10::IntArrayRef sizes, c10::ScalarType dtype) {
  return at::empty(sizes, OnCurrentDevice(dtype));
}

at::Tensor ToDevice(const at::Tensor& host) {
  if (!host.is_non_overlapping_and_dense() || host.is_conj() || host.is_neg()) {
    at::Tensor device = EmptyOnDevice(host.sizes(), host.scalar_type());
    OnHost(device).copy_(host);
    return device;
  }
  at::Tensor device = at::empty_strided(host.sizes(), host.strides(), OnCurrentDevice(host.scalar_type()));
  if (host.nbytes() > 0) std::memcpy(device.mutable_data_ptr(), host.const_data_ptr(), host.nbytes());
  return device;
}

void WaitForCurrentStream() { c10_npu::getCurrentNPUStream().synchronize(); }

}  // namespace ascend_emulator::aten
