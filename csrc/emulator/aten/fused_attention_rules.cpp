// SPDX-License-Identifier: Apache-2.0
//
// What npu_fused_infer_attention_score refuses. The limits are those of the operator's documentation for 910B
// and 910C and of the kernels in the project ops-transformer; where the two disagree the newer one counts.
#include <c10/util/Exception.h>

#include <limits>

#include "fused_attention.h"
#include "require.h"

namespace ascend_emulator::aten {
namespace {

constexpr int64_t kMaxHeads = 256;
constexpr int64_t kMaxGroup = 64;
constexpr int64_t kMaxHeadSize = 512;
constexpr int64_t kMaxSinkValueSize = 128;
constexpr int64_t kMaxPagedTokenSize = 65535;
constexpr int64_t kCompressedMaskSize = 2048;

struct LayoutRule {
  Layout layout;
  int64_t rank;
  const char* shape;
};

LayoutRule RuleOf(Layout layout) {
  switch (layout) {
    case Layout::kTnd:
      return {layout, 3, "[tokens, heads, head size]"};
    case Layout::kBsh:
      return {layout, 3, "[batch, tokens, heads * head size]"};
    case Layout::kBsnd:
      return {layout, 4, "[batch, tokens, heads, head size]"};
    case Layout::kBnsd:
      return {layout, 4, "[batch, heads, tokens, head size]"};
  }
  TORCH_INTERNAL_ASSERT(false, "a layout without a rule");
}

Argument Named(const FusedAttention& call, const char* name, const at::Tensor& tensor) {
  return {call.op.c_str(), name, tensor};
}

// --- heads, dtypes and shapes ---

void RequireHeadCounts(const FusedAttention& call) {
  TORCH_CHECK(call.num_heads >= 1 && call.num_heads <= kMaxHeads, call.op, ": there are ", call.num_heads,
              " query heads; it takes 1 to ", kMaxHeads);
  TORCH_CHECK(call.num_kv_heads >= 1 && call.num_heads % call.num_kv_heads == 0, call.op, ": there are ",
              call.num_heads, " query heads and ", call.num_kv_heads,
              " kv heads; the first has to be a multiple of the second");
  TORCH_CHECK(call.num_heads / call.num_kv_heads <= kMaxGroup, call.op, ": ",
              call.num_heads / call.num_kv_heads, " query heads share one of ", call.num_kv_heads,
              " kv heads; up to ", kMaxGroup, " can");
}

void RequireLayout(const FusedAttention& call, const char* name, const at::Tensor& tensor, int64_t heads) {
  const LayoutRule rule = RuleOf(call.layout);
  bool fits = tensor.dim() == rule.rank;
  switch (fits ? call.layout : Layout::kBsh) {
    case Layout::kBsh:
      fits = fits && tensor.size(2) % heads == 0;
      break;
    case Layout::kTnd:
      fits = tensor.size(1) == heads;
      break;
    case Layout::kBsnd:
      fits = tensor.size(2) == heads;
      break;
    case Layout::kBnsd:
      fits = tensor.size(1) == heads;
      break;
  }
  TORCH_CHECK(fits, call.op, ": ", name, " is ", Describe(tensor), " with input_layout \"", call.input_layout,
              "\" and ", heads, " heads; it has to be ", rule.shape);
}

void RequireHeadSize(const FusedAttention& call, const char* name, int64_t size) {
  TORCH_CHECK(size > 0 && size % 16 == 0 && size <= kMaxHeadSize, call.op, ": the head size of ", name,
              " is ", size, "; it has to be a multiple of 16 up to ", kMaxHeadSize);
}

void RequireSameKeySize(const FusedAttention& call, int64_t query_size, int64_t key_size) {
  TORCH_CHECK(query_size == key_size, call.op, ": the head size of query is ", query_size,
              " and that of key ", key_size, "; they have to be equal");
}

void RequirePlainKeys(const FusedAttention& call) {
  RequireLayout(call, "key", call.key, call.num_kv_heads);
  RequireLayout(call, "value", call.value, call.num_kv_heads);
  const at::Tensor keys = AsBatch(call.key, call.layout, call.num_kv_heads);
  const at::Tensor values = AsBatch(call.value, call.layout, call.num_kv_heads);
  const int64_t batch = call.Packed() ? 1 : call.query.size(0);
  TORCH_CHECK(keys.size(0) == batch && keys.sizes().slice(0, 3) == values.sizes().slice(0, 3), call.op,
              ": query is ", Describe(call.query), ", key is ", Describe(call.key), " and value is ",
              Describe(call.value), "; sequences, tokens and heads of key and value have to agree");
}

// --- paging ---

void RequireBlockSize(const FusedAttention& call) {
  const bool prefill = !call.Packed() && !call.SingleToken();
  const int64_t multiple = prefill ? 128 : 16;
  const int64_t highest = call.Packed() ? 1024 : 512;
  TORCH_CHECK(call.block_size > 0 && call.block_size % multiple == 0 && call.block_size <= highest, call.op,
              ": block_size is ", call.block_size, "; with input_layout \"", call.input_layout, "\" and ",
              call.Packed() ? "packed tokens"
              : prefill     ? "several query tokens"
                            : "one query token",
              " it has to be a multiple of ", multiple, " up to ", highest);
}

void RequireCache(const FusedAttention& call, const char* name, const at::Tensor& cache) {
  const bool flat = cache.dim() == 3;
  const bool by_heads = cache.dim() == 4 && (call.Packed() || call.layout == Layout::kBnsd);
  TORCH_CHECK(flat || by_heads, call.op, ": ", name, " is ", Describe(cache),
              " with a block_table and input_layout \"", call.input_layout,
              "\"; it has to be [num_blocks, block_size, kv heads * head size]",
              call.Packed() || call.layout == Layout::kBnsd
                  ? " or [num_blocks, kv heads, block_size, head size]"
                  : "");
  TORCH_CHECK(flat ? cache.size(2) % call.num_kv_heads == 0 : cache.size(1) == call.num_kv_heads, call.op,
              ": ", name, " is ", Describe(cache), ", which does not hold ", call.num_kv_heads, " kv heads",
              flat ? "" : " (a 4-D cache is read as [num_blocks, kv heads, block_size, head size])");
  const int64_t block_size = flat ? cache.size(1) : cache.size(2);
  TORCH_CHECK(block_size == call.block_size, call.op, ": block_size is ", call.block_size, " and ", name,
              " is ", Describe(cache), " with blocks of ", block_size, "; they have to agree");
  TORCH_CHECK(!flat || cache.size(2) <= kMaxPagedTokenSize, call.op, ": ", name, " is ", Describe(cache),
              "; a token of a 3-D cache takes up to ", kMaxPagedTokenSize, " elements");
}

void RequirePagedKeys(const FusedAttention& call) {
  const Argument table = Named(call, "block_table", *call.block_table);
  RequireDtype(table, {at::kInt});
  RequireRank(table, 2);
  RequireBlockSize(call);
  RequireCache(call, "key", call.key);
  RequireCache(call, "value", call.value);
  TORCH_CHECK(call.key.dim() == call.value.dim() && call.key.size(0) == call.value.size(0), call.op,
              ": key is ", Describe(call.key), " and value is ", Describe(call.value),
              "; they need the same number of blocks");
}

// --- masks ---

void RequireMaskDtype(const FusedAttention& call) {
  RequireDtype(Named(call, "atten_mask", *call.atten_mask), {at::kBool, at::kChar, at::kByte});
}

// A compressed mask is read by position, so one that is not triu(ones, 1) would give other results on a card.
void RequireCompressedMask(const FusedAttention& call) {
  TORCH_CHECK(call.atten_mask.has_value(), call.op, ": atten_mask is None; sparse_mode ", call.sparse_mode,
              " needs triu(ones(2048, 2048), 1) as bool, int8 or uint8");
  RequireMaskDtype(call);
  const at::Tensor& mask = *call.atten_mask;
  bool fits = mask.dim() >= 2 && mask.dim() <= 4 && mask.size(-1) == kCompressedMaskSize &&
              mask.size(-2) == kCompressedMaskSize &&
              mask.numel() == kCompressedMaskSize * kCompressedMaskSize;
  TORCH_CHECK(fits, call.op, ": atten_mask is ", Describe(mask), "; sparse_mode ", call.sparse_mode,
              " needs [2048, 2048], with leading dimensions of 1 at most");
}

void RequireSparseMode(const FusedAttention& call) {
  const int64_t mode = call.sparse_mode;
  const bool known = call.Packed() ? mode == 0 || mode == 3 || mode == 4 : mode >= 0 && mode <= 4;
  TORCH_CHECK(known, call.op, ": sparse_mode is ", mode, " with input_layout \"", call.input_layout,
              "\"; it has to be ", call.Packed() ? "0, 3 or 4" : "0, 1, 2, 3 or 4");
  if (call.NeedsCompressedMask()) return RequireCompressedMask(call);
  TORCH_CHECK(mode != 1 || call.atten_mask.has_value(), call.op,
              ": atten_mask is None; sparse_mode 1 needs the mask");
  if (!call.atten_mask.has_value() || mode >= 2) return;
  TORCH_CHECK(!call.Packed(), call.op, ": atten_mask is ", Describe(*call.atten_mask),
              " with sparse_mode 0; layout TND takes no mask in this mode");
  RequireMaskDtype(call);
  constexpr int64_t kDefault = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_NOT_IMPLEMENTED(
      mode == 1 || (call.pre_tokens >= kDefault && call.next_tokens >= kDefault), call.op, ": pre_tokens is ",
      call.pre_tokens, " and next_tokens is ", call.next_tokens,
      " beside a mask in sparse_mode 0; the emulator takes them at their defaults only");
}

void RequireSink(const FusedAttention& call) {
  const at::Tensor& sink = *call.learnable_sink;
  RequireSameDtype(Named(call, "learnable_sink", sink), Named(call, "query", call.query));
  TORCH_CHECK(call.Packed() && sink.dim() == 1 && sink.size(0) == call.num_heads, call.op,
              ": learnable_sink is ", Describe(sink), " with input_layout \"", call.input_layout,
              "\"; it needs layout TND and shape [", call.num_heads, "]");
  const int64_t value_size =
      call.Paged() && call.value.dim() == 3 ? call.value.size(-1) / call.num_kv_heads : call.value.size(-1);
  TORCH_CHECK(value_size <= kMaxSinkValueSize, call.op, ": the head size of value is ", value_size,
              "; with learnable_sink it is up to ", kMaxSinkValueSize);
  TORCH_CHECK_NOT_IMPLEMENTED(!call.wants_lse, call.op,
                              ": lse beside learnable_sink is not emulated; what it holds is not documented");
}

}  // namespace

void RequireAccepted(const FusedAttention& call) {
  const Argument query = Named(call, "query", call.query);
  RequireHalf(query);
  RequireSameDtype(Named(call, "key", call.key), query);
  RequireSameDtype(Named(call, "value", call.value), query);
  RequireHeadCounts(call);
  RequireLayout(call, "query", call.query, call.num_heads);
  if (call.Paged()) {
    RequirePagedKeys(call);
  } else {
    RequirePlainKeys(call);
  }
  const auto head_size = [&](const at::Tensor& tensor) {
    return (call.Paged() ? AsPages(tensor, call.num_kv_heads)
                         : AsBatch(tensor, call.layout, call.num_kv_heads))
        .size(3);
  };
  RequireHeadSize(call, "query", AsBatch(call.query, call.layout, call.num_heads).size(3));
  RequireHeadSize(call, "value", head_size(call.value));
  RequireSameKeySize(call, AsBatch(call.query, call.layout, call.num_heads).size(3), head_size(call.key));
  RequireSparseMode(call);
  if (call.learnable_sink.has_value()) RequireSink(call);
}

}  // namespace ascend_emulator::aten
