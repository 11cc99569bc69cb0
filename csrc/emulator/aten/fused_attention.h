// SPDX-License-Identifier: Apache-2.0
//
// npu_fused_infer_attention_score and its v2 as one call: what both mean under different argument names.
// The rules that a card enforces are in fused_attention_rules.cpp, what layouts, lists of lengths and masks
// mean in fused_attention_{layouts,lengths,masks}.cpp, and op_attention.cpp reads the call and computes.
#pragma once

#include <ATen/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "paged.h"

namespace ascend_emulator::aten {

/// The order of dimensions: T tokens of all sequences one after the other, B sequences, S tokens of a
/// sequence, N heads, D head size, H = N * D.
enum class Layout { kTnd, kBsh, kBsnd, kBnsd };

struct FusedAttention {
  std::string op;
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  std::optional<at::Tensor> atten_mask;
  std::optional<at::Tensor> block_table;
  /// [heads]; v2 only.
  std::optional<at::Tensor> learnable_sink;
  std::optional<std::vector<int64_t>> query_lengths;
  std::optional<std::vector<int64_t>> kv_lengths;
  /// What this version calls the two lists, for messages.
  const char* query_lengths_name;
  const char* kv_lengths_name;
  std::string input_layout;
  Layout layout;
  Layout out_layout;
  int64_t num_heads;
  int64_t num_kv_heads;
  double scale;
  int64_t pre_tokens;
  int64_t next_tokens;
  int64_t sparse_mode;
  int64_t block_size;
  bool wants_lse;

  bool Packed() const { return layout == Layout::kTnd; }
  bool Paged() const { return block_table.has_value(); }
  /// Query tokens per sequence; not defined for packed tokens.
  int64_t QuerySize() const { return query.size(layout == Layout::kBnsd ? 2 : 1); }
  /// One query token per sequence in a layout that is not packed; sparse_mode means nothing then.
  bool SingleToken() const { return !Packed() && QuerySize() == 1; }
  bool NeedsCompressedMask() const { return sparse_mode >= 2 && !SingleToken(); }
};

/// The tokens of one sequence in a tensor that is viewed as [batch, tokens, heads, size].
struct Place {
  int64_t batch;
  TokenSpan tokens;
};

/// "TND", "BSH", "BSND", "BNSD" or "BNSD_BSND" as the layouts of arguments and result; raises for others.
std::pair<Layout, Layout> LayoutsOf(const std::string& op, const std::string& input_layout);

/// A tensor of any layout, viewed as [batch, tokens, heads, size]; packed tokens are a batch of one.
at::Tensor AsBatch(const at::Tensor& tensor, Layout layout, int64_t heads);

/// A paged cache, viewed as [num_blocks, block_size, heads, size]. It is 3-D [num_blocks, block_size, heads *
/// size] or 4-D [num_blocks, heads, block_size, size].
at::Tensor AsPages(const at::Tensor& cache, int64_t heads);

/// Raises, saying what was given and what is required, unless a card (or, where noted, the emulator) takes
/// the call.
void RequireAccepted(const FusedAttention& call);

/// The query tokens of each sequence. Raises when the list of lengths is missing or does not fit the query.
std::vector<Place> QueryPlaces(const FusedAttention& call);

/// The keys of each of `batch` sequences; with paging only the length of a place has a meaning.
/// Raises when the list of lengths is missing or does not fit keys or block table.
std::vector<Place> KeyPlaces(const FusedAttention& call, int64_t batch);

/// Which of its `num_keys` keys the query tokens `rows` of a sequence see. Reads a full mask, if there is
/// one; raises when its shape does not fit.
Visibility VisibilityOf(const FusedAttention& call, int64_t sequence, const Place& rows, int64_t num_keys);

/// A card reads a compressed mask by position. Three corners tell triu(ones, 1) from its likely mistakes;
/// raises if they do not fit. Reads the mask.
void RequireUpperTriangle(const FusedAttention& call);

}  // namespace ascend_emulator::aten
