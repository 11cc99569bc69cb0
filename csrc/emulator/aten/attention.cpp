// SPDX-License-Identifier: Apache-2.0
//
// Grouped attention. The query heads that share a kv head become rows of one matrix, so that all is two
// batched products over the kv heads of the sequences. Rows are taken in slices, so that scores never outgrow
// kMaxScores while one row of each sequence fits.
#include "attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>

#include <algorithm>
#include <limits>

namespace ascend_emulator::aten {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxScores = int64_t{1} << 24;

// The keys that at least one of `rows` sees by distance.
TokenSpan Seen(const Visibility& visibility, TokenSpan rows, int64_t num_keys) {
  const int64_t begin = std::clamp<int64_t>(rows.begin - visibility.before, 0, num_keys);
  const int64_t end = std::clamp<int64_t>(rows.end - 1 + visibility.after + 1, begin, num_keys);
  return {begin, end};
}

// bool [rows, keys], true where hidden; undefined where every row sees every key of the span.
at::Tensor Hidden(const Visibility& visibility, TokenSpan rows, TokenSpan keys) {
  at::Tensor hidden;
  const bool first_row_sees_last_key = rows.begin + visibility.after >= keys.end - 1;
  const bool last_row_sees_first_key = rows.end - 1 - visibility.before <= keys.begin;
  if (!first_row_sees_last_key || !last_row_sees_first_key) {
    const at::Tensor i = at::arange(rows.begin, rows.end).unsqueeze(1);
    const at::Tensor j = at::arange(keys.begin, keys.end).unsqueeze(0);
    const at::Tensor distance = j.sub(i);
    hidden = distance.lt(-visibility.before).logical_or_(distance.gt(visibility.after));
  }
  if (!visibility.hidden.has_value()) return hidden;
  const at::Tensor masked =
      visibility.hidden->narrow(0, rows.begin, rows.size()).narrow(1, keys.begin, keys.size());
  return hidden.defined() ? hidden.logical_or_(masked) : masked;
}

// [sequences, tokens, heads, size] of any dtype -> float32 [sequences * heads, tokens, size].
at::Tensor HeadsFirst(const at::Tensor& tokens) {
  return tokens.transpose(1, 2)
      .to(at::TensorOptions().dtype(at::kFloat), /*non_blocking=*/false, /*copy=*/false,
          at::MemoryFormat::Contiguous)
      .flatten(0, 1);
}

// Rows [sequences, rows, kv heads * group, size] as [sequences * kv heads, group * rows, size], and back.
at::Tensor GroupRows(const at::Tensor& rows, int64_t kv_heads) {
  return rows.unflatten(2, {kv_heads, -1}).permute({0, 2, 3, 1, 4}).flatten(2, 3).flatten(0, 1);
}

at::Tensor UngroupRows(const at::Tensor& grouped, int64_t num_sequences, int64_t num_rows) {
  return grouped.unflatten(1, {-1, num_rows})
      .unflatten(0, {num_sequences, -1})
      .permute({0, 3, 1, 2, 4})
      .flatten(2, 3);
}

struct Slice {
  at::Tensor query;   // [sequences, rows, heads, size]
  at::Tensor keys;    // float32 [sequences * kv heads, keys, size]
  at::Tensor values;  // float32 [sequences * kv heads, keys, value size]
  at::Tensor hidden;  // bool [rows, keys] or undefined
};

void AttendSlice(const Slice& slice, const Softmax& softmax, const at::Tensor& out, const at::Tensor& lse) {
  const int64_t num_sequences = slice.query.size(0);
  const int64_t num_rows = slice.query.size(1);
  const int64_t kv_heads = slice.keys.size(0) / num_sequences;
  const at::Tensor query = GroupRows(slice.query.to(at::kFloat).mul(softmax.scale), kv_heads);
  at::Tensor scores =
      at::bmm(query, slice.keys.transpose(1, 2));  // [sequences * kv heads, group * rows, keys]
  if (slice.hidden.defined()) scores.unflatten(1, {-1, num_rows}).masked_fill_(slice.hidden, -kInfinity);

  at::Tensor highest = scores.amax(-1, /*keepdim=*/true);
  at::Tensor sink;
  if (softmax.sink.has_value()) {
    const at::Tensor per_row = softmax.sink->view({1, 1, -1, 1}).expand({num_sequences, num_rows, -1, 1});
    sink = GroupRows(per_row, kv_heads);
    highest = highest.maximum(sink);
  }
  // A row without a visible key has -inf as its highest score, and -inf - -inf is not a number.
  const at::Tensor shift = highest.masked_fill(highest.eq(-kInfinity), 0);
  scores.sub_(shift).exp_();
  at::Tensor sum = scores.sum(-1, /*keepdim=*/true);
  if (sink.defined()) sum.add_(sink.sub(shift).exp_());
  const at::Tensor sees_nothing = sum.eq(0);
  at::Tensor result = at::bmm(scores, slice.values).div_(sum);
  result.masked_fill_(sees_nothing, 0);
  out.copy_(UngroupRows(result, num_sequences, num_rows));
  if (!lse.defined()) return;
  const at::Tensor log_sum = shift.add(sum.log()).masked_fill_(sees_nothing, kInfinity);
  lse.copy_(UngroupRows(log_sum, num_sequences, num_rows).squeeze(-1));
}

// Rows that see no key: the card marks them by an lse of +inf.
void WriteUnseeing(const at::Tensor& out, const at::Tensor& lse) {
  out.zero_();
  if (lse.defined()) lse.fill_(kInfinity);
}

}  // namespace

void Attend(const Sequences& sequences, const Softmax& softmax, const at::Tensor& out,
            const at::Tensor& lse) {
  const int64_t num_rows = sequences.query.size(1);
  if (num_rows == 0) return;
  const TokenSpan seen = Seen(sequences.visibility, {0, num_rows}, sequences.num_keys);
  if (seen.size() == 0) return WriteUnseeing(out, lse);
  const at::Tensor keys = HeadsFirst(sequences.keys(seen));
  const at::Tensor values = HeadsFirst(sequences.values(seen));
  const int64_t scores_of_a_row = sequences.query.size(0) * sequences.query.size(2) * seen.size();
  const int64_t step = std::max<int64_t>(1, kMaxScores / scores_of_a_row);
  for (int64_t begin = 0; begin < num_rows; begin += step) {
    const TokenSpan rows{begin, std::min(begin + step, num_rows)};
    const TokenSpan span = Seen(sequences.visibility, rows, sequences.num_keys);
    const at::Tensor slice_out = out.narrow(1, rows.begin, rows.size());
    const at::Tensor slice_lse = lse.defined() ? lse.narrow(1, rows.begin, rows.size()) : lse;
    if (span.size() == 0) {
      WriteUnseeing(slice_out, slice_lse);
      continue;
    }
    const Slice slice{sequences.query.narrow(1, rows.begin, rows.size()),
                      keys.narrow(1, span.begin - seen.begin, span.size()),
                      values.narrow(1, span.begin - seen.begin, span.size()),
                      Hidden(sequences.visibility, rows, span)};
    AttendSlice(slice, softmax, slice_out, slice_lse);
  }
}

}  // namespace ascend_emulator::aten
