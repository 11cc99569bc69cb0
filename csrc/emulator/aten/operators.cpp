// SPDX-License-Identifier: Apache-2.0
//
// Puts the kernels of all families in place when the library is loaded, and a refusal in place of the rest.
// What is left to torch_npu allocates, describes or re-labels memory; what would compute needs CANN's own
// kernels.
#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <filesystem>

#include "overriding.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace ascend_emulator::aten {
namespace {

constexpr auto kKey = c10::DispatchKey::PrivateUse1;

// Of torch_npu's operators, those that work on the emulated device as they are.
bool LeftToTorchNpu(const std::string& name) {
  static const std::set<std::string> names{
      "_npu_format_cast",
      "_npu_fused_infer_attention_score_infer_output",
      "_npu_fused_infer_attention_score_v2_infer_output",
      "_npu_fusion_attention_v3_infer_output",
      "_npu_fusion_attention_grad_v3_infer_output",
      "copy_memory_",
      "empty_with_format",
      "empty_with_swapped_memory",
      "get_npu_format",
      "get_storage_size",
      "npu_change_data_ptr",
      "npu_format_cast",
      "npu_format_cast_",
      "npu_reshape",
      "npu_view_copy",
      "unsafe_empty_with_format",
  };
  return names.count(name) != 0;
}

std::string Qualified(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

void Refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, Qualified(op.operator_name()),
                              " is not emulated; see docs/emulator.md for the operators that are");
}

}  // namespace

Operators::Operators(const char* name_space)
    : name_space_(name_space), library_(torch::Library::IMPL, name_space, kKey, __FILE__, __LINE__) {}

void Operators::RefuseOthers() {
  const std::string prefix = name_space_ + "::";
  for (const c10::OperatorName& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.compare(0, prefix.size(), prefix) != 0) continue;
    if (LeftToTorchNpu(op.name.substr(prefix.size()))) continue;
    const std::string local = Qualified(op).substr(prefix.size());
    const auto handle = c10::Dispatcher::singleton().findOp(op);
    if (implemented_.count(local) != 0 || !handle || !handle->hasKernelForDispatchKey(kKey)) continue;
    library_.impl(local.c_str(), torch::CppFunction::makeFromBoxedFunction<&Refuse>());
  }
}

namespace {

// torch_npu defines and registers atb's operators in a library of its own, which Python loads when it likes;
// the kernels here have to come later. It lies beside libtorch_npu.so.
void LoadAtb() {
  Dl_info torch_npu{};
  const bool found = dladdr(reinterpret_cast<const void*>(&c10_npu::getCurrentNPUStream), &torch_npu) != 0;
  TORCH_CHECK(found, "ascend emulator: cannot tell which library holds torch_npu");
  const auto atb = std::filesystem::path(torch_npu.dli_fname).replace_filename("libop_plugin_atb.so");
  TORCH_CHECK(dlopen(atb.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr, "ascend emulator: cannot load ",
              atb.string(), ": ", dlerror());
}

bool Register() {
  const QuietOverrides quiet;
  LoadAtb();
  static Operators npu("npu");
  static Operators atb("atb");
  RegisterActivation(npu);
  RegisterAttention(npu);
  RegisterCast(npu);
  RegisterFusionAttention(npu);
  RegisterGroupedMatmul(npu);
  RegisterNorm(npu);
  RegisterRouting(npu);
  RegisterCache(atb);
  RegisterLatent(npu, atb);
  RegisterRotary(npu, atb);
  npu.RefuseOthers();
  atb.RefuseOthers();
  return true;
}

[[maybe_unused]] const bool registered = Register();

}  // namespace
}  // namespace ascend_emulator::aten
