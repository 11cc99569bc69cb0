// SPDX-License-Identifier: Apache-2.0
//
// A copy of one dense run of bytes goes through aclrtMemcpy, as torch_npu's own does. Everything else, on a
// card an operator, is PyTorch's CPU copy; an asynchronous one runs on the stream's thread.
//
// What is put on a stream refers to memory by address and does not keep it alive, again as on a card:
// torch_npu's allocators hand memory on in the order of the streams, and hold pinned memory back until a
// recorded event.
#include "copy.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/from_blob.h>
#include <acl/acl.h>

#include "../runtime/stream.h"
#include "tensors.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace ascend_emulator::aten {
namespace {

// A tensor's memory by address: what a stream may hold.
struct Memory {
  explicit Memory(const at::Tensor& tensor)
      : address(tensor.mutable_data_ptr()),
        sizes(tensor.sizes()),
        strides(tensor.strides()),
        dtype(tensor.scalar_type()) {}

  at::Tensor View() const { return at::from_blob(address, sizes, strides, at::TensorOptions(dtype)); }

  void* address;
  c10::DimVector sizes;
  c10::DimVector strides;
  c10::ScalarType dtype;
};

void Check(aclError code, const char* call) {
  TORCH_CHECK(code == ACL_SUCCESS, call, " failed with error code ", code, ": ", aclGetRecentErrMsg());
}

bool IsOneRun(const at::Tensor& target, const at::Tensor& source) {
  return target.scalar_type() == source.scalar_type() && target.strides() == source.strides() &&
         target.is_non_overlapping_and_dense() && target.is_conj() == source.is_conj() &&
         target.is_neg() == source.is_neg();
}

aclrtMemcpyKind KindOf(const at::Tensor& target, const at::Tensor& source) {
  if (!IsOnDevice(source)) return ACL_MEMCPY_HOST_TO_DEVICE;
  return IsOnDevice(target) ? ACL_MEMCPY_DEVICE_TO_DEVICE : ACL_MEMCPY_DEVICE_TO_HOST;
}

// `target` and `source` have the same sizes and the current stream is idle.
void CopyNow(const at::Tensor& target, const at::Tensor& source) {
  if (!IsOneRun(target, source)) {
    OnHost(target).copy_(OnHost(source));
    return;
  }
  Check(aclrtMemcpy(target.mutable_data_ptr(), target.nbytes(), source.const_data_ptr(), source.nbytes(),
                    KindOf(target, source)),
        "aclrtMemcpy");
}

void CopyOnStream(const at::Tensor& target, const at::Tensor& source) {
  // The conversion waits until torch_npu's task queue has handed its tasks over, so that this one follows
  // them.
  aclrtStream stream = c10_npu::getCurrentNPUStream();
  if (IsOneRun(target, source)) {
    Check(aclrtMemcpyAsync(target.mutable_data_ptr(), target.nbytes(), source.const_data_ptr(),
                           source.nbytes(), KindOf(target, source), stream),
          "aclrtMemcpyAsync");
    return;
  }
  Stream::From(stream).Enqueue(
      [to = Memory(target), from = Memory(source)] { to.View().copy_(from.View()); });
}

// Pinned memory must not be given to another tensor before the stream has passed this point.
void HoldUntilDone(const at::Tensor& pinned) {
  const c10::DataPtr& memory = pinned.storage().data_ptr();
  at::getHostAllocator(c10::DeviceType::PrivateUse1)
      ->record_event(memory.get(), memory.get_context(), c10_npu::getCurrentNPUStream().unwrap());
}

void CopyBetweenDevices(const at::Tensor& target, const at::Tensor& source) {
  const HostScope source_settled(source.device());
  const HostScope target_settled(target.device());
  CopyNow(target, source);
}

bool CanOutliveTheCall(const at::Tensor& target, const at::Tensor& source) {
  // Lazy conjugation and negation are bits of the tensor, which an address does not carry.
  if (target.is_conj() || target.is_neg() || source.is_conj() || source.is_neg()) return false;
  return (IsOnDevice(target) || target.is_pinned()) && (IsOnDevice(source) || source.is_pinned());
}

}  // namespace

at::Tensor& Copy(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  if (target.is_same(source)) return target;
  at::assert_no_internal_overlap(target);
  const at::Tensor from = *at::expand_inplace(target, source, "copy_");
  if (target.numel() == 0) return target;

  if (IsOnDevice(target) && IsOnDevice(source) && target.device() != source.device()) {
    CopyBetweenDevices(target, from);
    return target;
  }
  const c10::Device device = IsOnDevice(target) ? target.device() : source.device();
  if (!non_blocking || !CanOutliveTheCall(target, from)) {
    const HostScope settled(device);
    CopyNow(target, from);
    return target;
  }
  const c10::DeviceGuard guard(device);
  CopyOnStream(target, from);
  if (!IsOnDevice(target)) HoldUntilDone(target);
  if (!IsOnDevice(source)) HoldUntilDone(source);
  return target;
}

}  // namespace ascend_emulator::aten
