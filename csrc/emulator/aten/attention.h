// SPDX-License-Identifier: Apache-2.0
//
// Attention of sequences with grouped heads, in float32 on the CPU. Everything here is host memory; what
// the operators of torch_npu make of their layouts, lengths and masks is in op_attention.cpp.
#pragma once

#include <ATen/Tensor.h>

#include <functional>
#include <optional>

#include "paged.h"

namespace ascend_emulator::aten {

/// Further away than any two tokens.
constexpr int64_t kUnbounded = int64_t{1} << 40;

/// Which keys a query row may see: row i sees key j when i - before <= j <= i + after, and `hidden` is not
/// set for them.
struct Visibility {
  int64_t before = kUnbounded;
  int64_t after = kUnbounded;
  /// bool [rows, keys or more]; true hides.
  std::optional<at::Tensor> hidden = std::nullopt;
};

/// Sequences of one shape: as many rows each, as many keys, and every row i sees the same.
struct Sequences {
  /// [sequences, rows, heads, head size]
  at::Tensor query;
  int64_t num_keys;
  /// Called once each, with the span of keys that some row sees. They return [sequences, span, kv heads, head
  /// size]; query head h uses kv head h / (heads / kv heads). The head size of values may differ from that of
  /// keys.
  std::function<at::Tensor(TokenSpan)> keys;
  std::function<at::Tensor(TokenSpan)> values;
  Visibility visibility;
};

struct Softmax {
  double scale;
  /// float32 [heads]: one more logit per head, which takes part in the sum and has no value.
  std::optional<at::Tensor> sink = std::nullopt;
};

/// Writes softmax(scale * query . keys) . values to `out` [sequences, rows, heads, value head size], rounded
/// once to its dtype, and the logarithm of the sum of exponentials to `lse` float32 [sequences, rows, heads]
/// where it is defined. A row that sees no key becomes 0, its lse +inf.
void Attend(const Sequences& sequences, const Softmax& softmax, const at::Tensor& out, const at::Tensor& lse);

}  // namespace ascend_emulator::aten
