// SPDX-License-Identifier: Apache-2.0
//
// Follows a block table. Blocks outside of the asked tokens are neither read nor checked: the engine leaves
// stale ids in the table where a sliding window has moved on.
#include "paged.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

namespace ascend_emulator::aten {

BlockRow RowOf(const at::Tensor& block_table, int64_t index) {
  TORCH_INTERNAL_ASSERT(block_table.is_contiguous() && block_table.scalar_type() == at::kInt);
  const auto columns = static_cast<size_t>(block_table.size(1));
  return {block_table.const_data_ptr<int32_t>() + static_cast<size_t>(index) * columns, columns};
}

at::Tensor GatherTokens(const char* op, const at::Tensor& cache, BlockRow blocks, TokenSpan tokens) {
  const int64_t num_blocks = cache.size(0);
  const int64_t block_size = cache.size(1);
  const int64_t first = tokens.begin / block_size;
  const int64_t stop = tokens.size() == 0 ? first : (tokens.end + block_size - 1) / block_size;
  const auto columns = static_cast<int64_t>(blocks.size());
  TORCH_CHECK(stop <= columns, op, ": token ", tokens.end - 1,
              " of a sequence is asked for with a block size of ", block_size, ", which is block ", stop - 1,
              " of the sequence; the block table has ", columns, " columns");
  for (int64_t column = first; column < stop; ++column) {
    const int32_t block = blocks[static_cast<size_t>(column)];
    TORCH_CHECK(block >= 0 && block < num_blocks, op, ": the block table holds block ", block, " in column ",
                column, "; the cache has blocks 0 to ", num_blocks - 1,
                " (a card would read stray memory here)");
  }
  const auto ids = at::from_blob(const_cast<int32_t*>(blocks.data()) + first, {stop - first},
                                 at::TensorOptions().dtype(at::kInt));
  return cache.index_select(0, ids).flatten(0, 1).narrow(0, tokens.begin - first * block_size, tokens.size());
}

}  // namespace ascend_emulator::aten
