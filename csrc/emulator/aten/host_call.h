// SPDX-License-Identifier: Apache-2.0
//
// One call of an operator, carried out by its CPU kernel on the memory of NPU tensors.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/Storage.h>
#include <c10/util/SmallVector.h>

#include "signature.h"

namespace ascend_emulator::aten {

class HostCall {
 public:
  /// `stack` ends with the arguments of `op`, whose schema `signature` describes.
  HostCall(const c10::OperatorHandle& op, const Signature& signature, torch::jit::Stack* stack);

  /// Replaces the arguments on the stack by the results.
  void Run();

 private:
  // An NPU tensor among the arguments, and its memory as the CPU kernel sees it.
  struct Seen {
    at::Tensor device;
    at::Tensor host;
    bool written;
  };

  void FindDevice();
  void FindDevice(const at::Tensor& tensor);

  c10::IValue ToHost(const c10::IValue& value, const Signature::Argument& argument);
  at::Tensor ToHost(const at::Tensor& tensor, bool written);
  c10::Storage HostStorage(const at::Tensor& tensor) const;

  static void WriteBack(const Seen& seen);
  c10::IValue ToResult(const c10::IValue& value) const;
  at::Tensor ToResult(const at::Tensor& host) const;

  const c10::OperatorHandle& op_;
  const Signature& signature_;
  torch::jit::Stack* const stack_;
  const size_t first_argument_;

  c10::Device device_{c10::DeviceType::PrivateUse1};
  bool results_on_host_ = false;
  bool host_tensors_ = false;
  c10::SmallVector<Seen, 4> seen_;
};

}  // namespace ascend_emulator::aten
