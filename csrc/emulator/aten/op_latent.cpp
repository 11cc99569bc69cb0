// SPDX-License-Identifier: Apache-2.0
//
// What latent attention (MLA) needs beside npu_fused_infer_attention_score. _npu_paged_attention_mla is
// decode over a joint cache: a row is key and value of a token at once, the value being its first elements.
// npu_attention_update merges attention over pieces of the keys, each with its lse.
//
// Limits are those of the documentation of atb's PagedAttention (8.1.RC1: "MLA with a joint kv cache") and of
// aclnnAttentionUpdate.
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <limits>
#include <tuple>
#include <vector>

#include "attention.h"
#include "operators.h"
#include "paged.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kDecode = "_npu_paged_attention_mla";
constexpr const char* kMerge = "npu_attention_update";

// --- _npu_paged_attention_mla ---

constexpr int64_t kMaxSequences = 8192;
constexpr int64_t kMaxRowSize = 576;
constexpr int64_t kWideRowSize = 256;
constexpr int64_t kMaxBlockSizeOfWideRows = 128;

struct Decode {
  const at::Tensor& query;
  const at::Tensor& key_cache;
  int64_t num_kv_heads;
  int64_t num_heads;
  const at::Tensor& block_table;
  const at::Tensor& context_lens;
  int64_t value_size;
  const at::Tensor& out;
};

void RequireJointCache(const Decode& call) {
  const Argument cache{kDecode, "key_cache", call.key_cache};
  RequireSameDtype(cache, {kDecode, "query", call.query});
  RequireRank(cache, 4);
  const int64_t block_size = call.key_cache.size(1);
  const int64_t row_size = call.key_cache.size(3);
  TORCH_CHECK(call.num_kv_heads == 1 && call.key_cache.size(2) == 1, kDecode, ": num_kv_heads is ",
              call.num_kv_heads, " and key_cache is ", Describe(call.key_cache),
              "; all query heads share one latent, so there has to be 1");
  TORCH_CHECK(row_size > 0 && row_size % 16 == 0 && row_size <= kMaxRowSize, kDecode, ": key_cache is ",
              Describe(call.key_cache), "; its rows have to be a multiple of 16 elements up to ",
              kMaxRowSize);
  TORCH_CHECK(block_size > 0 && block_size % 16 == 0 &&
                  (row_size <= kWideRowSize || block_size <= kMaxBlockSizeOfWideRows),
              kDecode, ": key_cache is ", Describe(call.key_cache), " with blocks of ", block_size,
              "; they have to be a multiple of 16, and up to ", kMaxBlockSizeOfWideRows,
              " where rows are wider than ", kWideRowSize);
  TORCH_CHECK(call.value_size > 0 && call.value_size % 16 == 0 && call.value_size <= row_size, kDecode,
              ": mla_vheadsize is ", call.value_size, "; it has to be a multiple of 16 up to the ", row_size,
              " elements of a row");
}

void RequireRows(const Argument& rows, int64_t tokens, int64_t heads, int64_t size) {
  RequireRank(rows, 3);
  TORCH_CHECK(rows.tensor.sizes() == c10::IntArrayRef({tokens, heads, size}), rows.op, ": ", rows.name,
              " is ", Describe(rows.tensor), "; it has to be [", tokens, ", ", heads, ", ", size, "]");
}

// The operator plans on the host, so a tensor of lengths on the device is a null pointer to it.
void RequireHostLengths(const Decode& call) {
  const at::Tensor& lengths = call.context_lens;
  TORCH_CHECK(lengths.device().is_cpu() && lengths.scalar_type() == at::kInt && lengths.dim() == 1, kDecode,
              ": context_lens is ", Describe(lengths), "; it has to be int32[", call.query.size(0),
              "] on cpu");
  TORCH_CHECK(lengths.numel() == call.query.size(0), kDecode, ": context_lens is ", Describe(lengths),
              " and query is ", Describe(call.query), "; there has to be one length for each query token");
}

void Check(const Decode& call) {
  const Argument query{kDecode, "query", call.query};
  const Argument out{kDecode, "out", call.out};
  const Argument table{kDecode, "block_table", call.block_table};
  RequireHalf(query);
  RequireRank(query, 3);
  RequireJointCache(call);
  const int64_t tokens = call.query.size(0);
  RequireRows(query, tokens, call.num_heads, call.key_cache.size(3));
  RequireSameDtype(out, query);
  RequireRows(out, tokens, call.num_heads, call.value_size);
  RequireContiguous(out);
  TORCH_CHECK(tokens <= kMaxSequences, kDecode, ": query is ", Describe(call.query), "; up to ",
              kMaxSequences, " sequences can be decoded at once");
  RequireDtype(table, {at::kInt});
  RequireRank(table, 2);
  TORCH_CHECK(call.block_table.size(0) == tokens, kDecode, ": block_table is ", Describe(call.block_table),
              " and query is ", Describe(call.query), "; there has to be one row for each query token");
  RequireHostLengths(call);
}

void DecodeLatent(const at::Tensor& query, const at::Tensor& key_cache, int64_t num_kv_heads,
                  int64_t num_heads, double scale_value, const at::Tensor& block_table,
                  const at::Tensor& context_lens, int64_t mla_vheadsize, at::Tensor& out) {
  const Decode call{query, key_cache, num_kv_heads, num_heads, block_table, context_lens, mla_vheadsize, out};
  Check(call);
  const HostScope scope(query.device());
  const at::Tensor rows = OnHost(query);
  const at::Tensor pages = OnHost(key_cache);
  const at::Tensor table = OnHost(block_table).contiguous();
  const at::Tensor results = OnHost(out);
  const at::Tensor lengths = context_lens.contiguous();
  for (int64_t b = 0; b < rows.size(0); ++b) {
    const int64_t num_keys = lengths.const_data_ptr<int32_t>()[b];
    TORCH_CHECK(num_keys > 0, kDecode, ": context_lens gives sequence ", b, " the length ", num_keys,
                "; it has to be 1 or more");
    const at::Tensor keys = GatherTokens(kDecode, pages, table.narrow(0, b, 1), {0, num_keys});
    const auto part = [&keys](int64_t size) {
      return [&keys, size](TokenSpan span) {
        return keys.narrow(1, span.begin, span.size()).narrow(3, 0, size);
      };
    };
    const auto row = [b](const at::Tensor& tensor) { return tensor.narrow(0, b, 1).unsqueeze(1); };
    Attend({row(rows), num_keys, part(keys.size(3)), part(mla_vheadsize), Visibility{}}, Softmax{scale_value},
           row(results), at::Tensor());
  }
}

// --- npu_attention_update ---

constexpr size_t kMaxPieces = 16;
constexpr int64_t kMaxMergedSize = 512;

void RequirePieces(at::TensorList lse, at::TensorList local_out, int64_t update_type) {
  TORCH_CHECK(!lse.empty() && lse.size() <= kMaxPieces && lse.size() == local_out.size(), kMerge,
              ": lse has ", lse.size(), " tensors and local_out ", local_out.size(),
              "; both need the same number, 1 to ", kMaxPieces);
  TORCH_CHECK(update_type == 0, kMerge, ": update_type is ", update_type,
              "; torch_npu hands no lse of the result over, so it has to be 0");
  const at::Tensor& first = local_out[0];
  RequireDtype({kMerge, "local_out[0]", first}, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireRank({kMerge, "local_out[0]", first}, 2);
  TORCH_CHECK(first.size(1) >= 8 && first.size(1) % 8 == 0 && first.size(1) <= kMaxMergedSize, kMerge,
              ": local_out[0] is ", Describe(first), "; rows have to be a multiple of 8 elements up to ",
              kMaxMergedSize);
  for (size_t i = 0; i < lse.size(); ++i) {
    const Argument sums{kMerge, "lse", lse[i]};
    const Argument rows{kMerge, "local_out", local_out[i]};
    RequireDtype(sums, {at::kFloat});
    RequireSameDtype(rows, {kMerge, "local_out[0]", first});
    RequireContiguous(sums);
    RequireContiguous(rows);
    TORCH_CHECK(lse[i].dim() == 1 && local_out[i].sizes() == first.sizes() && lse[i].size(0) == first.size(0),
                kMerge, ": lse[", i, "] is ", Describe(lse[i]), " and local_out[", i, "] is ",
                Describe(local_out[i]), "; they have to be [rows] and [rows, size], the same for all");
  }
}

std::vector<at::Tensor> HostViews(at::TensorList tensors) {
  std::vector<at::Tensor> views;
  for (const at::Tensor& tensor : tensors) views.push_back(OnHost(tensor));
  return views;
}

std::tuple<at::Tensor, at::Tensor> Merge(at::TensorList lse, at::TensorList local_out, int64_t update_type) {
  RequirePieces(lse, local_out, update_type);
  const HostScope scope(local_out[0].device());
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  at::Tensor weights = at::stack(HostViews(lse));  // [pieces, rows]
  // +inf marks a row that saw no key: it takes no part.
  weights.masked_fill_(weights.eq(kInfinity), -kInfinity);
  weights = weights.softmax(0).nan_to_num_(0).unsqueeze(-1);
  const at::Tensor rows = at::stack(HostViews(local_out)).to(at::kFloat);
  at::Tensor merged = EmptyOnDevice(local_out[0].sizes(), local_out[0].scalar_type());
  OnHost(merged).copy_(rows.mul_(weights).sum(0));
  return {merged, at::Tensor()};
}

}  // namespace

void RegisterLatent(Operators& npu, Operators& atb) {
  atb.Implement(kDecode, TORCH_FN(DecodeLatent));
  npu.Implement(kMerge, TORCH_FN(Merge));
}

}  // namespace ascend_emulator::aten
