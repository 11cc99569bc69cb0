// SPDX-License-Identifier: Apache-2.0
//
// What the lists of lengths of npu_fused_infer_attention_score mean. Packed tokens (TND): ends of the
// sequences, no leading 0, one per sequence, but for keys plain lengths as soon as there is a block table.
// Other layouts: plain lengths, where one entry stands for all sequences and entries past the batch are not
// looked at.
#include <c10/util/Exception.h>

#include "fused_attention.h"
#include "require.h"

namespace ascend_emulator::aten {
namespace {

constexpr size_t kMaxPackedSequences = 4096;

struct List {
  const FusedAttention& call;
  const char* name;
  const std::optional<std::vector<int64_t>>& values;
};

const std::vector<int64_t>& Given(const List& list, const char* why) {
  TORCH_CHECK(list.values.has_value() && !list.values->empty(), list.call.op, ": ", list.name, " is ",
              list.values.has_value() ? "empty" : "None", "; ", why);
  return *list.values;
}

std::vector<Place> FromEnds(const List& list, int64_t num_tokens) {
  const auto& ends = Given(list, "layout TND needs the end of every sequence, counted from the first token");
  TORCH_CHECK(ends.size() <= kMaxPackedSequences, list.call.op, ": ", list.name, " has ", ends.size(),
              " entries; layout TND takes up to ", kMaxPackedSequences, " sequences");
  std::vector<Place> places;
  int64_t begin = 0;
  for (const int64_t end : ends) {
    TORCH_CHECK(end >= begin, list.call.op, ": ", list.name, " holds ", end, " after ", begin,
                "; in layout TND it is cumulative and cannot fall");
    places.push_back({0, {begin, end}});
    begin = end;
  }
  TORCH_CHECK(begin == num_tokens, list.call.op, ": ", list.name, " ends with ", begin, " and there are ",
              num_tokens, " tokens; the two have to be equal");
  return places;
}

int64_t Length(const List& list, size_t index, int64_t capacity) {
  const int64_t length = (*list.values)[index];
  TORCH_CHECK(length >= 0 && length <= capacity, list.call.op, ": ", list.name, " gives sequence ", index,
              " the length ", length, "; it has to be between 0 and ", capacity);
  return length;
}

std::vector<Place> FromLengths(const List& list, int64_t batch, int64_t capacity) {
  const auto& lengths = *list.values;
  const auto count = static_cast<size_t>(batch);
  TORCH_CHECK(lengths.size() == 1 || lengths.size() >= count, list.call.op, ": ", list.name, " has ",
              lengths.size(), " entries; it needs 1 or at least ", batch, ", one for each sequence");
  std::vector<Place> places;
  for (size_t b = 0; b < count; ++b) {
    places.push_back({static_cast<int64_t>(b), {0, Length(list, lengths.size() == 1 ? 0 : b, capacity)}});
  }
  return places;
}

std::vector<Place> Full(int64_t batch, int64_t tokens) {
  std::vector<Place> places;
  for (int64_t b = 0; b < batch; ++b) places.push_back({b, {0, tokens}});
  return places;
}

}  // namespace

std::vector<Place> QueryPlaces(const FusedAttention& call) {
  const List list{call, call.query_lengths_name, call.query_lengths};
  if (call.Packed()) return FromEnds(list, call.query.size(0));
  const int64_t batch = call.query.size(0);
  if (!list.values.has_value() || list.values->empty() || call.SingleToken())
    return Full(batch, call.QuerySize());
  return FromLengths(list, batch, call.QuerySize());
}

std::vector<Place> KeyPlaces(const FusedAttention& call, int64_t batch) {
  const List list{call, call.kv_lengths_name, call.kv_lengths};
  if (call.Paged()) {
    const auto& lengths = Given(list, "with a block_table every sequence needs the number of its keys");
    TORCH_CHECK(!call.Packed() || lengths.size() == static_cast<size_t>(batch), call.op, ": ", list.name,
                " has ", lengths.size(), " entries and ", call.query_lengths_name, " has ", batch,
                "; layout TND needs one for each sequence");
    TORCH_CHECK(call.block_table->size(0) == batch, call.op, ": block_table is ", Describe(*call.block_table),
                " for ", batch, " sequences; it needs one row for each");
    return FromLengths(list, batch, call.block_table->size(1) * call.block_size);
  }
  if (call.Packed()) {
    std::vector<Place> places = FromEnds(list, call.key.size(0));
    TORCH_CHECK(places.size() == static_cast<size_t>(batch), call.op, ": ", list.name, " has ", places.size(),
                " entries and ", call.query_lengths_name, " has ", batch,
                "; both need one for each sequence");
    return places;
  }
  const int64_t keys = call.key.size(call.layout == Layout::kBnsd ? 2 : 1);
  if (!list.values.has_value() || list.values->empty()) return Full(batch, keys);
  return FromLengths(list, batch, keys);
}

}  // namespace ascend_emulator::aten
