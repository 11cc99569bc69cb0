// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>

#include <optional>

namespace ascend_emulator::aten {

/// A CPU generator for one operator, drawn from an NPU generator: equal NPU states give equal numbers, and
/// each draw advances the NPU state. Without a generator the default one of the current device is used.
/// Raises an error for a generator of another device, as torch_npu does.
at::Generator DrawHostGenerator(const std::optional<at::Generator>& generator);

}  // namespace ascend_emulator::aten
