// SPDX-License-Identifier: Apache-2.0
//
// Reading a paged cache: the one place that follows a block table.
#pragma once

#include <ATen/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace ascend_emulator::aten {

/// Tokens [begin, end) of a sequence, counted from its first block.
struct TokenSpan {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

/// The blocks of one sequence in order, a row of a block table.
using BlockRow = c10::ArrayRef<int32_t>;

/// Row `index` of a block table int32 [B, columns] in host memory. It must outlive the result.
BlockRow RowOf(const at::Tensor& block_table, int64_t index);

/// Copies `tokens` of a sequence out of `cache` [num_blocks, block_size, ...], a CPU view with any strides;
/// only the blocks that hold these tokens are read. Returns [tokens, ...]. Raises, naming `op`, when the row
/// is too short or a block id lies outside of the cache. A card checks neither: it reads whatever memory the
/// address leads to.
at::Tensor GatherTokens(const char* op, const at::Tensor& cache, BlockRow blocks, TokenSpan tokens);

}  // namespace ascend_emulator::aten
