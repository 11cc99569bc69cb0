// SPDX-License-Identifier: Apache-2.0
//
// Reading a paged cache: the one place that follows a block table.
#pragma once

#include <ATen/Tensor.h>

namespace ascend_emulator::aten {

/// Tokens [begin, end) of a sequence, counted from its first block.
struct TokenSpan {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

/// Copies the same `tokens` of every sequence out of `cache` [num_blocks, block_size, ...], a CPU view with
/// any strides; only the blocks that hold these tokens are read. `block_table`: int32 [sequences, columns] on
/// the CPU, a sequence's blocks in order. Returns [sequences, tokens, ...]. Raises, naming `op`, when the
/// table has too few columns or a block id lies outside of the cache. A card checks neither: it reads
/// whatever memory the address leads to.
at::Tensor GatherTokens(const char* op, const at::Tensor& cache, const at::Tensor& block_table,
                        TokenSpan tokens);

}  // namespace ascend_emulator::aten
