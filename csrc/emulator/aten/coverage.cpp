// SPDX-License-Identifier: Apache-2.0
//
// Which kernel serves which ATen operator on the emulated device, put in place when the library is loaded.
// Of the operators for which torch_npu has an NPU kernel,
//   - those that allocate, describe or look at memory keep torch_npu's;
//   - factories and copies are put together from other operators by PyTorch's composite kernel, so that large
//   results
//     are written once and in place;
//   - the others run PyTorch's CPU kernel on the NPU tensors' memory;
//   - what has no CPU kernel is refused by its name.
// Operators without an NPU kernel do what they do on a card: PyTorch's composite kernel, or torch_npu's own
// fallback.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <set>
#include <string>

#include "copy.h"
#include "host_call.h"
#include "overriding.h"
#include "signature.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr auto kNpu = c10::DispatchKey::PrivateUse1;

bool KeepsTorchNpuKernel(const std::string& name) {
  static const std::set<std::string> names{
      "aten::_copy_from_and_resize",
      "aten::_local_scalar_dense",
      "aten::_pin_memory",
      "aten::_reshape_alias",
      "aten::as_strided",
      "aten::as_strided_",
      "aten::copy_memory_",
      "aten::empty",
      "aten::empty_like",
      "aten::empty_strided",
      "aten::empty_with_format",
      "aten::empty_with_swapped_memory",
      "aten::get_npu_format",
      "aten::get_storage_size",
      "aten::is_pinned",
      "aten::is_set_to",
      "aten::new_empty_strided",
      "aten::record_stream",
      "aten::resize_",
      "aten::resize_as_",
      "aten::set_",
      "aten::squeeze",
      "aten::unfold",
      "aten::unsafe_empty_with_format",
      "aten::unsqueeze",
      "aten::view",
      "aten::view_as_complex",
      "aten::view_as_real",
  };
  return names.count(name) != 0;
}

bool IsPutTogether(const std::string& name) {
  static const std::set<std::string> names{
      "aten::_lazy_clone", "aten::_to_copy", "aten::clone",     "aten::contiguous", "aten::full",
      "aten::one_hot",     "aten::ones",     "aten::ones_like", "aten::randperm",   "aten::zeros",
  };
  return names.count(name) != 0;
}

// The CPU kernel on the same memory.
class OnHostKernel : public c10::OperatorKernel {
 public:
  explicit OnHostKernel(const c10::FunctionSchema& schema) : signature_(schema) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    HostCall(op, signature_, stack).Run();
  }

 private:
  const Signature signature_;
};

// The kernel that PyTorch composes of other operators, which run on the NPU in their turn.
class CompositeKernel : public c10::OperatorKernel {
 public:
  explicit CompositeKernel(c10::DispatchKey key) : key_(key) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    op.callBoxedForDispatchKey(key_, *stack);
  }

 private:
  const c10::DispatchKey key_;
};

// Where PyTorch composes an operator, torch_npu has a fused one in front of autograd. Here it is PyTorch's
// own again if gradients are asked for or memory is written (autograd counts writes), and otherwise the NPU
// kernel below.
class BeforeAutogradKernel : public c10::OperatorKernel {
 public:
  explicit BeforeAutogradKernel(const c10::FunctionSchema& schema)
      : num_arguments_(schema.arguments().size()) {
    for (const c10::Argument& argument : schema.arguments()) {
      writes_ = writes_ || (argument.alias_info() != nullptr && argument.alias_info()->isWrite());
    }
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    if (writes_ ||
        (at::GradMode::is_enabled() && AnyRequiresGrad(torch::jit::last(*stack, num_arguments_)))) {
      op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, *stack);
      return;
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }

 private:
  static bool AnyRequiresGrad(c10::ArrayRef<c10::IValue> arguments) {
    bool found = false;
    for (const c10::IValue& argument : arguments) {
      ForEachTensor(argument,
                    [&found](const at::Tensor& tensor) { found = found || tensor.requires_grad(); });
    }
    return found;
  }

  size_t num_arguments_;
  bool writes_ = false;
};

void Refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name(),
                              " is not emulated: PyTorch has no CPU kernel for it; see docs/emulator.md");
}

std::optional<c10::DispatchKey> CompositeKeyOf(const c10::OperatorHandle& op) {
  for (const auto key :
       {c10::DispatchKey::CompositeExplicitAutograd, c10::DispatchKey::CompositeImplicitAutograd}) {
    if (op.hasKernelForDispatchKey(key)) return key;
  }
  return std::nullopt;
}

torch::CppFunction KernelFor(const c10::OperatorHandle& op) {
  const std::optional<c10::DispatchKey> composite = CompositeKeyOf(op);
  if (IsPutTogether(op.operator_name().name) && composite) {
    return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<CompositeKernel>(*composite));
  }
  if (op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) {
    return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<OnHostKernel>(op.schema()));
  }
  return torch::CppFunction::makeFromBoxedFunction<&Refuse>();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  const QuietOverrides quiet;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNamesForDispatchKey(kNpu)) {
    const std::optional<c10::OperatorHandle> op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || name.getNamespace() != "aten" || name.name == "aten::copy_" || KeepsTorchNpuKernel(name.name))
      continue;
    library.impl(c10::toString(name).c_str(), KernelFor(*op));
  }
  library.impl("copy_", &Copy);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  const QuietOverrides quiet;
  constexpr auto kAutogradNpu = c10::DispatchKey::AutogradPrivateUse1;
  for (const c10::OperatorName& name :
       c10::Dispatcher::singleton().getAllOpNamesForDispatchKey(kAutogradNpu)) {
    const std::optional<c10::OperatorHandle> op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || name.getNamespace() != "aten") continue;
    if (!op->hasKernelForDispatchKey(kNpu)) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) continue;
    library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                                  std::make_unique<BeforeAutogradKernel>(op->schema())));
  }
}

}  // namespace
}  // namespace ascend_emulator::aten
