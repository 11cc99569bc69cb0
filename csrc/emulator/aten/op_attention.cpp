// SPDX-License-Identifier: Apache-2.0
//
// npu_fused_infer_attention_score and npu_fused_infer_attention_score_v2, each with its out form. A call is
// read by argument names, checked against a card's rules and cut into sequences. Those of one shape, as the
// KV heads of a request on head-major pages, are attended at once, in float32, keys and values gathered from
// the cache as they are reached.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <map>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "attention.h"
#include "fused_attention.h"
#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

// --- reading the call ---

// What the two versions call the same thing.
struct Version {
  const char* query_lengths;
  const char* kv_lengths;
  const char* num_heads;
  const char* scale;
  const char* wants_lse;
  /// Null where the version has none.
  const char* sink;
};

constexpr Version kV1{
    "actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale", "softmax_lse_flag", nullptr};
constexpr Version kV2{"actual_seq_qlen", "actual_seq_kvlen",   "num_query_heads",
                      "softmax_scale",   "return_softmax_lse", "learnable_sink"};

FusedAttention Read(Arguments& arguments, const Version& version) {
  FusedAttention call;
  call.op = arguments.Operator();
  call.query = arguments.Tensor("query");
  call.key = arguments.Tensor("key");
  call.value = arguments.Tensor("value");
  call.atten_mask = arguments.OptionalTensor("atten_mask");
  call.block_table = arguments.OptionalTensor("block_table");
  call.query_lengths = arguments.OptionalInts(version.query_lengths);
  call.kv_lengths = arguments.OptionalInts(version.kv_lengths);
  call.query_lengths_name = version.query_lengths;
  call.kv_lengths_name = version.kv_lengths;
  call.input_layout = arguments.Text("input_layout");
  std::tie(call.layout, call.out_layout) = LayoutsOf(call.op, call.input_layout);
  call.num_heads = arguments.Int(version.num_heads);
  const int64_t num_kv_heads = arguments.Int("num_key_value_heads");
  call.num_kv_heads = num_kv_heads == 0 ? call.num_heads : num_kv_heads;
  call.scale = arguments.Float(version.scale);
  call.pre_tokens = arguments.Int("pre_tokens");
  call.next_tokens = arguments.Int("next_tokens");
  call.sparse_mode = arguments.Int("sparse_mode");
  call.block_size = arguments.Int("block_size");
  call.wants_lse = arguments.Bool(version.wants_lse);
  if (version.sink != nullptr) call.learnable_sink = arguments.OptionalTensor(version.sink);
  // Chooses between precise and fast kernels of a card; here there is one.
  const int64_t inner_precise = arguments.Int("inner_precise");
  TORCH_CHECK(inner_precise >= 0 && inner_precise <= 3, call.op, ": inner_precise is ", inner_precise,
              "; it has to be 0, 1, 2 or 3");
  return call;
}

// --- results ---

struct Results {
  at::Tensor attention;
  at::Tensor lse;
};

std::vector<int64_t> OutSizes(const FusedAttention& call, int64_t value_size) {
  const at::Tensor rows = AsBatch(call.query, call.layout, call.num_heads);
  const int64_t batch = rows.size(0);
  const int64_t tokens = rows.size(1);
  switch (call.out_layout) {
    case Layout::kTnd:
      return {tokens, call.num_heads, value_size};
    case Layout::kBsh:
      return {batch, tokens, call.num_heads * value_size};
    case Layout::kBsnd:
      return {batch, tokens, call.num_heads, value_size};
    case Layout::kBnsd:
      return {batch, call.num_heads, tokens, value_size};
  }
  TORCH_INTERNAL_ASSERT(false, "a layout without sizes");
}

std::vector<int64_t> LseSizes(const FusedAttention& call) {
  if (!call.wants_lse) return {0};
  if (call.Packed()) return {call.query.size(0), call.num_heads, 1};
  return {call.query.size(0), call.num_heads, call.QuerySize(), 1};
}

// float32 [batch, tokens, heads], undefined where lse is not asked for.
at::Tensor LseRows(const FusedAttention& call, const at::Tensor& lse) {
  if (!call.wants_lse) return {};
  const at::Tensor rows = OnHost(lse).squeeze(-1);
  return call.Packed() ? rows.unsqueeze(0) : rows.transpose(1, 2);
}

int64_t ValueSize(const FusedAttention& call) {
  const bool paged = call.Paged();
  return (paged ? AsPages(call.value, call.num_kv_heads)
                : AsBatch(call.value, call.layout, call.num_kv_heads))
      .size(3);
}

Results Allocate(const FusedAttention& call) {
  return {EmptyOnDevice(OutSizes(call, ValueSize(call)), call.query.scalar_type()),
          EmptyOnDevice(LseSizes(call), at::kFloat)};
}

void RequireResult(const Argument& given, const std::vector<int64_t>& sizes, c10::ScalarType dtype) {
  RequireDtype(given, {dtype});
  RequireContiguous(given);
  TORCH_CHECK(given.tensor.sizes() == c10::IntArrayRef(sizes), given.op, ": ", given.name, " is ",
              Describe(given.tensor), "; it has to have the shape ", c10::IntArrayRef(sizes));
}

// The lse that was not asked for may be of any shape and keeps its content.
Results Given(const FusedAttention& call, const std::vector<at::Tensor>& out) {
  TORCH_CHECK(out.size() == 2, call.op, ": out has ", out.size(), " tensors; it has to be [attention, lse]");
  RequireResult({call.op.c_str(), "out[0]", out[0]}, OutSizes(call, ValueSize(call)),
                call.query.scalar_type());
  if (call.wants_lse) RequireResult({call.op.c_str(), "out[1]", out[1]}, LseSizes(call), at::kFloat);
  return {out[0], out[1]};
}

// --- computing ---

// Elements of keys that are held as float32 at a time; more would leave a core's cache.
constexpr int64_t kMaxKeysAtOnce = int64_t{1} << 20;

// Sequences of one shape, and where they lie.
struct Alike {
  std::vector<int64_t> sequences;
  std::vector<Place> queries;
  std::vector<Place> keys;
};

std::vector<Alike> Cut(const FusedAttention& call) {
  const std::vector<Place> queries = QueryPlaces(call);
  const std::vector<Place> keys = KeyPlaces(call, static_cast<int64_t>(queries.size()));
  // A mask that is read hides something else from each sequence.
  const bool reads_mask = call.atten_mask.has_value() && !call.NeedsCompressedMask();
  const int64_t key_size = call.num_kv_heads * AsBatch(call.query, call.layout, call.num_heads).size(3);
  std::vector<Alike> cut;
  std::map<std::pair<int64_t, int64_t>, size_t> last_of_shape;
  for (size_t b = 0; b < queries.size(); ++b) {
    const int64_t num_keys = keys[b].tokens.size();
    const auto [last, is_new] = last_of_shape.try_emplace({queries[b].tokens.size(), num_keys}, cut.size());
    const auto count = is_new ? 0 : static_cast<int64_t>(cut[last->second].sequences.size());
    if (is_new || reads_mask || (count + 1) * num_keys * key_size > kMaxKeysAtOnce) {
      last->second = cut.size();
      cut.emplace_back();
    }
    Alike& alike = cut[last->second];
    alike.sequences.push_back(static_cast<int64_t>(b));
    alike.queries.push_back(queries[b]);
    alike.keys.push_back(keys[b]);
  }
  return cut;
}

// The tokens at `places`, which are as many at each, in tensors [batch, tokens, ...].
class Rows {
 public:
  explicit Rows(const std::vector<Place>& places)
      : first_(places.front()), num_places_(static_cast<int64_t>(places.size())) {
    if (places.size() == 1) return;
    std::vector<int64_t> batches;
    std::vector<int64_t> tokens;
    for (const Place& place : places) {
      batches.push_back(place.batch);
      for (int64_t token = place.tokens.begin; token < place.tokens.end; ++token) tokens.push_back(token);
    }
    at_ = {at::tensor(batches).unsqueeze(1), at::tensor(tokens).view({num_places_, first_.tokens.size()})};
  }

  // [places, tokens, ...]: a view of one place, a copy of several.
  at::Tensor Of(const at::Tensor& tensor) const {
    if (!at_.empty()) return tensor.index(at_);
    const TokenSpan tokens = first_.tokens;
    return tensor.narrow(0, first_.batch, 1).narrow(1, tokens.begin, tokens.size());
  }

  // Where to write [places, tokens, ...] before `Put`: a view of one place, new memory for several.
  at::Tensor RoomFor(const at::Tensor& tensor) const {
    if (at_.empty()) return Of(tensor);
    std::vector<int64_t> sizes = tensor.sizes().vec();
    sizes[0] = num_places_;
    sizes[1] = first_.tokens.size();
    return at::empty(sizes, tensor.options());
  }

  void Put(const at::Tensor& tensor, const at::Tensor& rows) const {
    if (!at_.empty()) at::Tensor(tensor).index_put_(at_, rows);
  }

 private:
  Place first_;
  int64_t num_places_;
  std::vector<at::indexing::TensorIndex> at_;  // empty for one place
};

// Gives tokens of keys or values, [sequences, tokens, kv heads, size].
std::function<at::Tensor(TokenSpan)> TokensOf(const FusedAttention& call, const at::Tensor& tensor,
                                              const at::Tensor& block_table, const Alike& alike) {
  if (call.Paged()) {
    return [&call, pages = AsPages(OnHost(tensor), call.num_kv_heads),
            table = block_table.index_select(0, at::tensor(alike.sequences))](TokenSpan tokens) {
      return GatherTokens(call.op.c_str(), pages, table, tokens);
    };
  }
  return [found = Rows(alike.keys).Of(AsBatch(OnHost(tensor), call.layout, call.num_kv_heads))](
             TokenSpan tokens) { return found.narrow(1, tokens.begin, tokens.size()); };
}

void Compute(const FusedAttention& call, const Results& results) {
  const at::Tensor query = AsBatch(OnHost(call.query), call.layout, call.num_heads);
  const at::Tensor out = AsBatch(OnHost(results.attention), call.out_layout, call.num_heads);
  const at::Tensor lse = LseRows(call, results.lse);
  const at::Tensor table = call.Paged() ? OnHost(*call.block_table) : at::Tensor();
  Softmax softmax{call.scale};
  if (call.learnable_sink) softmax.sink = OnHost(*call.learnable_sink).to(at::kFloat);
  for (const Alike& alike : Cut(call)) {
    const Rows rows(alike.queries);
    const int64_t num_keys = alike.keys.front().tokens.size();
    const at::Tensor attended = rows.RoomFor(out);
    const at::Tensor sums = lse.defined() ? rows.RoomFor(lse) : lse;
    Attend({rows.Of(query), num_keys, TokensOf(call, call.key, table, alike),
            TokensOf(call, call.value, table, alike),
            VisibilityOf(call, alike.sequences.front(), alike.queries.front(), num_keys)},
           softmax, attended, sums);
    rows.Put(out, attended);
    if (lse.defined()) rows.Put(lse, sums);
  }
}

// --- entry points ---

Results Run(const FusedAttention& call, const std::optional<std::vector<at::Tensor>>& out) {
  RequireAccepted(call);
  const HostScope scope(call.query.device());
  if (call.NeedsCompressedMask()) RequireUpperTriangle(call);
  const Results results = out ? Given(call, *out) : Allocate(call);
  Compute(call, results);
  return results;
}

void Return(torch::jit::Stack* stack, const c10::OperatorHandle& op, const Results& results) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::push(*stack, results.attention, results.lse);
}

template <const Version& version>
void Score(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Arguments arguments(op, *stack);
  const FusedAttention call = Read(arguments, version);
  arguments.RefuseRest();
  Return(stack, op, Run(call, std::nullopt));
}

template <const Version& version>
void ScoreInto(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Arguments arguments(op, *stack);
  const FusedAttention call = Read(arguments, version);
  const std::vector<at::Tensor> out = arguments.Tensors("out");
  // Scratch memory for a card's kernel; this one needs none.
  arguments.OptionalTensor("workspace");
  arguments.RefuseRest();
  Return(stack, op, Run(call, out));
}

}  // namespace

void RegisterAttention(Operators& npu) {
  using torch::CppFunction;
  npu.Implement("npu_fused_infer_attention_score", CppFunction::makeFromBoxedFunction<&Score<kV1>>());
  npu.Implement("npu_fused_infer_attention_score.out", CppFunction::makeFromBoxedFunction<&ScoreInto<kV1>>());
  npu.Implement("npu_fused_infer_attention_score_v2", CppFunction::makeFromBoxedFunction<&Score<kV2>>());
  npu.Implement("npu_fused_infer_attention_score_v2.out",
                CppFunction::makeFromBoxedFunction<&ScoreInto<kV2>>());
}

}  // namespace ascend_emulator::aten
