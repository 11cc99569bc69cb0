// SPDX-License-Identifier: Apache-2.0
//
// Which keys npu_fused_infer_attention_score lets a query token see. A compressed mask says no more than that
// there is one: sparse_mode gives its meaning. A full mask is what it says.
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

#include "fused_attention.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

int64_t Bounded(int64_t tokens) { return std::clamp(tokens, -kUnbounded, kUnbounded); }

// One query token over a 3-D cache in layout BSH: pre_tokens is a window of the last keys, and needs no mask.
bool IsDecodeWindow(const FusedAttention& call) {
  return call.layout == Layout::kBsh && call.SingleToken() && call.Paged() && call.key.dim() == 3 &&
         call.pre_tokens > 0 && call.pre_tokens < std::numeric_limits<int32_t>::max();
}

// What a full mask hides from one sequence, bool [rows, keys].
at::Tensor HiddenBy(const FusedAttention& call, const at::Tensor& mask, int64_t sequence, const Place& rows,
                    int64_t num_keys) {
  const int64_t batch = call.query.size(0);
  const int64_t query_size = call.QuerySize();
  at::Tensor planes = mask;
  const bool row_per_sequence = mask.dim() == 2 && query_size == 1 && mask.size(0) == batch;
  if (mask.dim() == 2) planes = mask.unsqueeze(row_per_sequence ? 1 : 0);
  if (mask.dim() == 4 && mask.size(1) == 1) planes = mask.squeeze(1);
  const bool fits = planes.dim() == 3 && planes.size(1) == query_size && planes.size(2) >= num_keys &&
                    (planes.size(0) == 1 || (planes.size(0) == batch && mask.dim() != 3));
  TORCH_CHECK(fits, call.op, ": atten_mask is ", Describe(*call.atten_mask), " for ", batch, " sequences of ",
              query_size, " query tokens and ", num_keys, " keys; in sparse_mode ", call.sparse_mode,
              " it has to be [queries, keys], [1, queries, keys], [batch or 1, 1, queries, keys], or for one "
              "query token [batch, keys]");
  return planes[planes.size(0) == 1 ? 0 : sequence]
      .narrow(0, rows.tokens.begin, rows.tokens.size())
      .narrow(1, 0, num_keys)
      .to(at::kBool);
}

}  // namespace

Visibility VisibilityOf(const FusedAttention& call, int64_t sequence, const Place& rows, int64_t num_keys) {
  const int64_t offset = num_keys - rows.tokens.size();
  if (IsDecodeWindow(call)) return {.before = call.pre_tokens - 1 - offset, .after = kUnbounded};
  if (call.SingleToken() && call.sparse_mode >= 2) return {};
  switch (call.sparse_mode) {
    case 2:
      return {.before = kUnbounded, .after = 0};
    case 3:
      return {.before = kUnbounded, .after = offset};
    case 4:
      return {.before = Bounded(call.pre_tokens) - offset, .after = Bounded(call.next_tokens) + offset};
    default:
      break;
  }
  if (!call.atten_mask.has_value()) return {};
  return {.hidden = HiddenBy(call, OnHost(*call.atten_mask), sequence, rows, num_keys)};
}

void RequireUpperTriangle(const FusedAttention& call) {
  const at::Tensor mask = OnHost(*call.atten_mask).flatten(0, -2);
  const int64_t last = mask.size(0) - 1;
  const auto hides = [&](int64_t row, int64_t column) { return mask[row][column].item<int64_t>() != 0; };
  TORCH_CHECK(!hides(0, 0) && !hides(last, 0) && !hides(last, last) && hides(0, last), call.op,
              ": atten_mask is not triu(ones(2048, 2048), 1), where 1 hides; sparse_mode ", call.sparse_mode,
              " needs it");
}

}  // namespace ascend_emulator::aten
