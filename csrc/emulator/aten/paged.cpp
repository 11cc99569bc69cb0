// SPDX-License-Identifier: Apache-2.0
//
// Follows a block table. Blocks outside of the asked tokens are neither read nor checked: the engine leaves
// stale ids in the table where a sliding window has moved on.
#include "paged.h"

#include <c10/util/Exception.h>

namespace ascend_emulator::aten {

at::Tensor GatherTokens(const char* op, const at::Tensor& cache, const at::Tensor& block_table,
                        TokenSpan tokens) {
  const int64_t num_blocks = cache.size(0);
  const int64_t block_size = cache.size(1);
  const int64_t first = tokens.begin / block_size;
  const int64_t stop = tokens.size() == 0 ? first : (tokens.end + block_size - 1) / block_size;
  const int64_t num_sequences = block_table.size(0);
  const int64_t columns = block_table.size(1);
  TORCH_CHECK(stop <= columns, op, ": token ", tokens.end - 1,
              " of a sequence is asked for with a block size of ", block_size, ", which is block ", stop - 1,
              " of the sequence; the block table has ", columns, " columns");
  const at::Tensor read = block_table.narrow(1, first, stop - first).contiguous();
  const int32_t* ids = read.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < read.numel(); ++i) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < num_blocks, op, ": the block table holds block ", ids[i],
                " in column ", first + i % (stop - first), "; the cache has blocks 0 to ", num_blocks - 1,
                " (a card would read stray memory here)");
  }
  return cache.index_select(0, read.flatten())
      .unflatten(0, {num_sequences, stop - first})
      .flatten(1, 2)
      .narrow(1, tokens.begin - first * block_size, tokens.size());
}

}  // namespace ascend_emulator::aten
