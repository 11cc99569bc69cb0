// SPDX-License-Identifier: Apache-2.0
//
// How torch_npu's own operators (namespaces npu and atb) come to the emulated device. A family of operators
// has a file op_<family>.cpp with one Register function, declared here; operators.cpp calls them all when the
// library is loaded, and afterwards refuses every other operator of the two namespaces by its name.
//
// The schemas are torch_npu's: a kernel whose signature differs is rejected by the dispatcher at load.
#pragma once

#include <torch/library.h>

#include <set>
#include <string>
#include <utility>

namespace ascend_emulator::aten {

/// The NPU kernels of one namespace. They stay registered for the life of the object.
class Operators {
 public:
  /// `name_space` is "npu" or "atb"; torch_npu's own kernels must be registered already, since the last one
  /// wins.
  explicit Operators(const char* name_space);

  /// Make `kernel` what runs for `name`, an operator with its overload ("npu_rms_norm",
  /// "npu_paged_cache_load.out").
  template <typename Kernel>
  void Implement(const char* name, Kernel&& kernel) {
    library_.impl(name, std::forward<Kernel>(kernel));
    implemented_.insert(name);
  }

  /// Let every other operator of the namespace for which torch_npu has an NPU kernel raise an error with its
  /// name, except for those that compute nothing, which are left to torch_npu.
  void RefuseOthers();

 private:
  std::string name_space_;
  torch::Library library_;
  std::set<std::string> implemented_;
};

void RegisterActivation(Operators& npu);
void RegisterAttention(Operators& npu);
void RegisterCache(Operators& atb);
void RegisterCast(Operators& npu);
void RegisterFusionAttention(Operators& npu);
void RegisterGroupedMatmul(Operators& npu);
void RegisterLatent(Operators& npu, Operators& atb);
void RegisterNorm(Operators& npu);
void RegisterRotary(Operators& npu, Operators& atb);
void RegisterRouting(Operators& npu);

}  // namespace ascend_emulator::aten
