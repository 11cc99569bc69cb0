// SPDX-License-Identifier: Apache-2.0
//
// The arguments of an operator by name. Operators such as npu_fused_infer_attention_score have fifty of them,
// most for features that are not emulated: a kernel asks for those it honours and refuses the others unless
// they are at their defaults, so that none is ever ignored.
#pragma once

#include <ATen/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <optional>
#include <string>
#include <vector>

namespace ascend_emulator::aten {

/// One call of a boxed kernel. Names are those of the schema; an unknown one is a mistake of the kernel.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack);

  /// The operator without namespace and overload.
  const std::string& Operator() const { return operator_; }

  at::Tensor Tensor(const char* name);
  std::optional<at::Tensor> OptionalTensor(const char* name);
  std::vector<at::Tensor> Tensors(const char* name);
  /// nullopt for None and for an empty list.
  std::optional<std::vector<at::Tensor>> OptionalTensors(const char* name);
  std::optional<std::vector<int64_t>> OptionalInts(const char* name);
  std::string Text(const char* name);
  int64_t Int(const char* name);
  std::optional<int64_t> OptionalInt(const char* name);
  double Float(const char* name);
  bool Bool(const char* name);

  /// Raises, with its name, if an argument that none of the functions above was called for is not at its
  /// default.
  void RefuseRest() const;

 private:
  const c10::IValue& Take(const char* name);

  const c10::FunctionSchema& schema_;
  std::string operator_;
  std::vector<c10::IValue> values_;
  std::vector<bool> taken_;
};

}  // namespace ascend_emulator::aten
