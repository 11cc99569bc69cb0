// SPDX-License-Identifier: Apache-2.0
//
// What the CPU kernel of an operator needs to know about its schema, worked out once per operator.
#pragma once

#include <ATen/core/function_schema.h>

#include <optional>
#include <vector>

namespace ascend_emulator::aten {

/// How an argument is handed to the CPU kernel.
enum class Passing {
  kAsIs,
  kTensors,    // Tensor, Tensor?, Tensor[], Tensor?[]: memory seen from the host
  kGenerator,  // Generator?: a CPU generator drawn from the NPU one
  kDevice,     // Device?: replaced by the CPU; says where results go
  kPinMemory,  // pin_memory: only host memory can be pinned
};

struct Signature {
  explicit Signature(const c10::FunctionSchema& schema);

  struct Argument {
    Passing passing;
    bool written;
  };

  std::vector<Argument> arguments;
  /// For each return, the argument that is handed back: the caller's own tensor of an in-place or out=
  /// operator.
  std::vector<std::optional<size_t>> returned_argument;
  /// Indices may be on the CPU while the rest is on the NPU; elsewhere that is a user's mistake.
  bool takes_host_tensors;
};

}  // namespace ascend_emulator::aten
