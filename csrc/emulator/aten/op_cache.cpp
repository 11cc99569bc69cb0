// SPDX-License-Identifier: Apache-2.0
//
// atb's operators on a paged cache of ND layout [num_blocks, block_size, heads, head size]:
// npu_paged_cache_load copies the tokens of sequences out of it, _npu_reshape_and_cache(_siso) stores tokens
// at slots, where slot = block * block_size + offset.
//
// atb makes its arguments contiguous first. What it writes to must therefore be contiguous: the update of
// a copy would be lost without a word.
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "operators.h"
#include "paged.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kLoad = "npu_paged_cache_load";
constexpr const char* kStore = "_npu_reshape_and_cache";
constexpr const char* kStoreOne = "_npu_reshape_and_cache_siso";

// What the unified buffer of a 910B holds of one token of key and of value.
constexpr int64_t kMaxTokenBytes = 147 * 1024;

void RequireIndices(const Argument& argument, int64_t rank) {
  RequireDtype(argument, {at::kInt});
  RequireRank(argument, rank);
}

// --- npu_paged_cache_load ---

struct Load {
  const at::Tensor& key_cache;
  const at::Tensor& value_cache;
  const at::Tensor& block_table;
  const at::Tensor& context_lens;
  const std::optional<at::Tensor>& seq_starts;
  bool cumsum;
};

void RequireLoadable(const Argument& cache) {
  RequireRank(cache, 4);
  const int64_t token_size = cache.tensor.size(2) * cache.tensor.size(3);
  const int64_t multiple = cache.tensor.scalar_type() == at::kChar ? 32 : 16;
  TORCH_CHECK(token_size % multiple == 0, cache.op, ": ", cache.name, " is ", Describe(cache.tensor),
              ", which makes ", token_size, " elements per token; they have to be a multiple of ", multiple);
  const int64_t token_bytes = token_size * cache.tensor.element_size();
  TORCH_CHECK(token_bytes <= kMaxTokenBytes, cache.op, ": ", cache.name, " is ", Describe(cache.tensor),
              ", which makes ", token_bytes, " bytes per token; a card takes up to ", kMaxTokenBytes);
}

void RequireSamePages(const Argument& key_cache, const Argument& value_cache) {
  RequireSameDtype(value_cache, key_cache);
  TORCH_CHECK(key_cache.tensor.sizes().slice(0, 3) == value_cache.tensor.sizes().slice(0, 3), key_cache.op,
              ": key_cache is ", Describe(key_cache.tensor), " and value_cache is ",
              Describe(value_cache.tensor), "; they may differ in the last size only");
}

void Check(const Load& load) {
  const Argument key_cache{kLoad, "key_cache", load.key_cache};
  const Argument value_cache{kLoad, "value_cache", load.value_cache};
  if (load.key_cache.scalar_type() != at::kChar) RequireHalf(key_cache);
  RequireOnDevice(key_cache);
  RequireLoadable(key_cache);
  RequireLoadable(value_cache);
  RequireSamePages(key_cache, value_cache);
  RequireIndices({kLoad, "block_table", load.block_table}, 2);
  RequireIndices({kLoad, "context_lens", load.context_lens}, 1);
  const int64_t batch = load.block_table.size(0);
  TORCH_CHECK(
      load.context_lens.numel() == batch + (load.cumsum ? 1 : 0), kLoad, ": context_lens is ",
      Describe(load.context_lens), " with cumsum=", load.cumsum ? "True" : "False",
      " and the block table has ", batch,
      " rows; context_lens has to hold one length per row, or with cumsum a leading 0 and one end per row");
  if (!load.seq_starts.has_value()) return;
  RequireIndices({kLoad, "seq_starts", *load.seq_starts}, 1);
  TORCH_CHECK(load.seq_starts->numel() == batch, kLoad, ": seq_starts is ", Describe(*load.seq_starts),
              "; it has to hold one start for each of the ", batch, " rows of the block table");
}

std::vector<int64_t> Lengths(const Load& load) {
  const at::Tensor lens = OnHost(load.context_lens).contiguous();
  const auto* given = lens.const_data_ptr<int32_t>();
  std::vector<int64_t> lengths(static_cast<size_t>(load.block_table.size(0)));
  TORCH_CHECK(!load.cumsum || given[0] == 0, kLoad, ": context_lens begins with ", given[0],
              "; with cumsum=True it has to begin with 0");
  for (size_t b = 0; b < lengths.size(); ++b) {
    lengths[b] = load.cumsum ? int64_t{given[b + 1]} - given[b] : given[b];
    TORCH_CHECK(lengths[b] >= 0, kLoad, ": context_lens gives sequence ", b, " the length ", lengths[b],
                "; it has to be 0 or more");
  }
  return lengths;
}

// `rows` [total tokens, heads, head size] takes the sequences one after the other.
void LoadRows(const Load& load, const std::vector<int64_t>& lengths, const at::Tensor& cache,
              const at::Tensor& rows) {
  const at::Tensor pages = OnHost(cache);
  const at::Tensor table = OnHost(load.block_table).contiguous();
  const int64_t block_size = pages.size(1);
  int64_t row = 0;
  for (size_t b = 0; b < lengths.size(); ++b) {
    const auto sequence = static_cast<int64_t>(b);
    const int64_t asked_start = load.seq_starts ? OnHost(*load.seq_starts)[sequence].item<int64_t>() : 0;
    TORCH_CHECK(asked_start >= 0, kLoad, ": seq_starts gives sequence ", b, " the start ", asked_start,
                "; it has to be 0 or more");
    // A start acts in whole blocks: copying begins at the first token of the block it lies in.
    const int64_t start = asked_start / block_size * block_size;
    rows.narrow(0, row, lengths[b])
        .copy_(GatherTokens(kLoad, pages, table.narrow(0, sequence, 1), {start, start + lengths[b]})[0]);
    row += lengths[b];
  }
}

int64_t Total(const std::vector<int64_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

std::tuple<at::Tensor, at::Tensor> LoadNew(const at::Tensor& key_cache, const at::Tensor& value_cache,
                                           const at::Tensor& block_table, const at::Tensor& context_lens,
                                           const std::optional<at::Tensor>& seq_starts, bool cumsum) {
  const Load load{key_cache, value_cache, block_table, context_lens, seq_starts, cumsum};
  Check(load);
  const HostScope scope(key_cache.device());
  const std::vector<int64_t> lengths = Lengths(load);
  const auto load_new = [&](const at::Tensor& cache) {
    at::Tensor rows = EmptyOnDevice({Total(lengths), cache.size(2), cache.size(3)}, cache.scalar_type());
    LoadRows(load, lengths, cache, OnHost(rows));
    return rows;
  };
  return {load_new(key_cache), load_new(value_cache)};
}

// A card does not look at the shape of the result; it writes past the end of one that is too small.
void RequireRoom(const Argument& rows, const Argument& cache, int64_t total) {
  RequireSameDtype(rows, cache);
  RequireContiguous(rows);
  TORCH_CHECK(rows.tensor.dim() == 3 && rows.tensor.size(0) >= total &&
                  rows.tensor.sizes().slice(1) == cache.tensor.sizes().slice(2),
              rows.op, ": ", rows.name, " is ", Describe(rows.tensor), " for ", total, " tokens out of ",
              cache.name, " ", Describe(cache.tensor), "; it has to be [at least ", total, ", ",
              cache.tensor.size(2), ", ", cache.tensor.size(3), "]");
}

std::tuple<at::Tensor&, at::Tensor&> LoadInto(const at::Tensor& key_cache, const at::Tensor& value_cache,
                                              const at::Tensor& block_table, const at::Tensor& context_lens,
                                              const std::optional<at::Tensor>& seq_starts, bool cumsum,
                                              at::Tensor& key, at::Tensor& value) {
  const Load load{key_cache, value_cache, block_table, context_lens, seq_starts, cumsum};
  Check(load);
  const HostScope scope(key_cache.device());
  const std::vector<int64_t> lengths = Lengths(load);
  RequireRoom({kLoad, "key", key}, {kLoad, "key_cache", key_cache}, Total(lengths));
  RequireRoom({kLoad, "value", value}, {kLoad, "value_cache", value_cache}, Total(lengths));
  LoadRows(load, lengths, key_cache, OnHost(key));
  LoadRows(load, lengths, value_cache, OnHost(value));
  return {key, value};
}

// --- _npu_reshape_and_cache ---

void RequireStorable(const Argument& rows, const Argument& cache, const at::Tensor& slots) {
  RequireOnDevice(rows);
  RequireSameDtype(cache, rows);
  TORCH_CHECK(rows.tensor.element_size() <= (Float32Allowed() ? 4 : 2), rows.op, ": ", rows.name, " is ",
              Describe(rows.tensor), "; its elements have to be of 1 or 2 bytes");
  RequireRank(rows, 3);
  RequireRank(cache, 4);
  RequireContiguous(cache);
  TORCH_CHECK(rows.tensor.sizes().slice(1) == cache.tensor.sizes().slice(2), rows.op, ": ", rows.name, " is ",
              Describe(rows.tensor), " and ", cache.name, " is ", Describe(cache.tensor),
              "; heads and head size have to agree");
  TORCH_CHECK(rows.tensor.size(0) == slots.numel(), rows.op, ": ", rows.name, " is ", Describe(rows.tensor),
              " and slot_indices is ", Describe(slots), "; there has to be one slot for each row");
}

void RequireSlotsInside(const char* op, const at::Tensor& cache, const at::Tensor& slots) {
  const int64_t num_slots = cache.size(0) * cache.size(1);
  const auto* slot = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i) {
    TORCH_CHECK(slot[i] < num_slots, op, ": slot_indices holds ", slot[i], " for row ", i,
                "; the cache has slots 0 to ", num_slots - 1, " (a card would write to stray memory here)");
  }
}

// Rows of negative slots are padding and go nowhere. All arguments are CPU views; cache and slots are
// contiguous.
void StoreRows(const at::Tensor& rows, const at::Tensor& cache, const at::Tensor& slots) {
  if (rows.numel() == 0) return;
  const at::Tensor source = rows.contiguous();
  const size_t row_bytes = source.nbytes() / static_cast<size_t>(source.size(0));
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  const auto* slot = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i) {
    if (slot[i] < 0) continue;
    std::memcpy(to + static_cast<size_t>(slot[i]) * row_bytes, from + static_cast<size_t>(i) * row_bytes,
                row_bytes);
  }
}

void Store(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_cache, at::Tensor& value_cache,
           const at::Tensor& slot_indices) {
  RequireIndices({kStore, "slot_indices", slot_indices}, 1);
  RequireStorable({kStore, "key", key}, {kStore, "key_cache", key_cache}, slot_indices);
  RequireStorable({kStore, "value", value}, {kStore, "value_cache", value_cache}, slot_indices);
  RequireSamePages({kStore, "key_cache", key_cache}, {kStore, "value_cache", value_cache});
  const HostScope scope(key.device());
  const at::Tensor slots = OnHost(slot_indices).contiguous();
  RequireSlotsInside(kStore, key_cache, slots);
  StoreRows(OnHost(key), OnHost(key_cache), slots);
  StoreRows(OnHost(value), OnHost(value_cache), slots);
}

void StoreOne(const at::Tensor& key, at::Tensor& key_cache, const at::Tensor& slot_indices) {
  RequireIndices({kStoreOne, "slot_indices", slot_indices}, 1);
  RequireStorable({kStoreOne, "key", key}, {kStoreOne, "key_cache", key_cache}, slot_indices);
  const HostScope scope(key.device());
  const at::Tensor slots = OnHost(slot_indices).contiguous();
  RequireSlotsInside(kStoreOne, key_cache, slots);
  StoreRows(OnHost(key), OnHost(key_cache), slots);
}

}  // namespace

void RegisterCache(Operators& atb) {
  atb.Implement(kLoad, TORCH_FN(LoadNew));
  atb.Implement("npu_paged_cache_load.out", TORCH_FN(LoadInto));
  atb.Implement(kStore, TORCH_FN(Store));
  atb.Implement(kStoreOne, TORCH_FN(StoreOne));
}

}  // namespace ascend_emulator::aten
