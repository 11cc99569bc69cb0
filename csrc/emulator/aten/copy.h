// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Tensor.h>

namespace ascend_emulator::aten {

/// aten::copy_ where at least one side is an NPU tensor: any strides, dtypes and devices; `source` is
/// broadcast. The copy happens in the order of the current stream of the NPU tensor's device (between two
/// NPUs, after what is on both). With `non_blocking` the call returns at once and the stream copies, unless
/// the host side is pageable memory, which the caller may change or free as soon as the call returns; then,
/// and without `non_blocking`, it is done on return. Returns `target`; raises what torch raises if shapes do
/// not broadcast or `target` overlaps itself.
at::Tensor& Copy(at::Tensor& target, const at::Tensor& source, bool non_blocking);

}  // namespace ascend_emulator::aten
