// SPDX-License-Identifier: Apache-2.0
//
// npu_fusion_attention over packed tokens (layout TND): attention between sequences of which nothing is in a
// cache. Masks, lengths and layout mean what they mean to npu_fused_infer_attention_score, so the call is
// read into the same form; what it takes differs: heads of every size, float32 on every card.
//
// Limits are those of the operator's documentation and of torch_npu's own checks; where the documentation
// gives two, the lower one.
#include <c10/util/Exception.h>

#include <limits>
#include <tuple>

#include "arguments.h"
#include "attention.h"
#include "fused_attention.h"
#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr int64_t kMaxHeads = 256;
constexpr int64_t kMaxHeadSize = 768;
constexpr int64_t kMaxTokens = int64_t{1} << 20;
constexpr size_t kMaxSequences = 1024;
constexpr int64_t kMaskSize = 2048;
/// Floats in which a card holds the maximum, and the sum, of a row.
constexpr int64_t kRowStatistics = 8;

// --- reading the call ---

Layout LayoutOf(const std::string& op, const std::string& input_layout) {
  const bool known = input_layout == "TND" || input_layout == "BSH" || input_layout == "SBH" ||
                     input_layout == "BNSD" || input_layout == "BSND";
  TORCH_CHECK(known, op, ": input_layout is \"", input_layout,
              "\"; it has to be TND, BSH, SBH, BNSD or BSND");
  TORCH_CHECK_NOT_IMPLEMENTED(input_layout == "TND", op, ": input_layout is \"", input_layout,
                              "\"; the emulator has TND");
  return Layout::kTnd;
}

// Dropout is for training. The others choose how a card makes its random numbers, or between its kernels.
void ReadTraining(Arguments& arguments) {
  const double keep_prob = arguments.Float("keep_prob");
  TORCH_CHECK(keep_prob > 0 && keep_prob <= 1, arguments.Operator(), ": keep_prob is ", keep_prob,
              "; it has to be above 0 and up to 1");
  TORCH_CHECK_NOT_IMPLEMENTED(keep_prob == 1, arguments.Operator(), ": keep_prob is ", keep_prob,
                              "; the emulator drops nothing out");
  arguments.Bool("gen_mask_parallel");
  arguments.Bool("sync");
  arguments.Int("inner_precise");
  const std::string layout = arguments.Text("softmax_layout");
  TORCH_CHECK(layout.empty() || layout == "TND", arguments.Operator(), ": softmax_layout is \"", layout,
              "\"; it has to be TND, or empty");
}

FusedAttention Read(Arguments& arguments) {
  FusedAttention call;
  call.op = arguments.Operator();
  call.query = arguments.Tensor("query");
  call.key = arguments.Tensor("key");
  call.value = arguments.Tensor("value");
  call.num_heads = arguments.Int("head_num");
  call.input_layout = arguments.Text("input_layout");
  call.layout = call.out_layout = LayoutOf(call.op, call.input_layout);
  call.atten_mask = arguments.OptionalTensor("atten_mask");
  call.query_lengths = arguments.OptionalInts("actual_seq_qlen");
  call.kv_lengths = arguments.OptionalInts("actual_seq_kvlen");
  call.query_lengths_name = "actual_seq_qlen";
  call.kv_lengths_name = "actual_seq_kvlen";
  call.scale = arguments.Float("scale");
  call.pre_tokens = arguments.Int("pre_tockens");
  call.next_tokens = arguments.Int("next_tockens");
  call.sparse_mode = arguments.Int("sparse_mode");
  call.block_size = 0;
  call.wants_lse = false;
  ReadTraining(arguments);
  return call;
}

// --- what a card refuses ---

Argument Named(const FusedAttention& call, const char* name, const at::Tensor& tensor) {
  return {call.op.c_str(), name, tensor};
}

void RequireTensors(const FusedAttention& call) {
  const Argument query = Named(call, "query", call.query);
  const Argument key = Named(call, "key", call.key);
  const Argument value = Named(call, "value", call.value);
  RequireDtype(query, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireSameDtype(key, query);
  RequireSameDtype(value, query);
  for (const Argument& argument : {query, key, value}) {
    RequireRank(argument, 3);
    const int64_t tokens = argument.tensor.size(0);
    TORCH_CHECK(tokens >= 1 && tokens <= kMaxTokens, call.op, ": ", argument.name, " is ",
                Describe(argument.tensor), "; it takes 1 to ", kMaxTokens, " tokens");
  }
}

void RequireHeads(const FusedAttention& call) {
  const int64_t heads = call.query.size(1);
  const int64_t kv_heads = call.key.size(1);
  TORCH_CHECK(call.num_heads == heads && heads >= 1 && heads <= kMaxHeads, call.op, ": head_num is ",
              call.num_heads, " and query is ", Describe(call.query),
              "; head_num has to be the number of its heads, 1 to ", kMaxHeads);
  TORCH_CHECK(kv_heads >= 1 && heads % kv_heads == 0, call.op, ": query has ", heads, " heads and key has ",
              kv_heads, "; the first has to be a multiple of the second");
  const int64_t size = call.query.size(2);
  const int64_t value_size = call.value.size(2);
  TORCH_CHECK(size >= 1 && size <= kMaxHeadSize && call.key.size(2) == size, call.op,
              ": the head size of query is ", size, " and that of key ", call.key.size(2),
              "; they have to be equal, 1 to ", kMaxHeadSize);
  TORCH_CHECK(
      call.value.sizes().slice(0, 2) == call.key.sizes().slice(0, 2) && value_size >= 1 && value_size <= size,
      call.op, ": key is ", Describe(call.key), " and value is ", Describe(call.value),
      "; tokens and heads have to agree, and heads of value cannot be larger than those of key");
}

void RequireSequences(const FusedAttention& call) {
  for (const auto& [name, lengths] : {std::pair{call.query_lengths_name, &call.query_lengths},
                                      std::pair{call.kv_lengths_name, &call.kv_lengths}}) {
    if (!lengths->has_value()) continue;
    const std::vector<int64_t>& ends = **lengths;
    TORCH_CHECK(ends.size() <= kMaxSequences, call.op, ": ", name, " has ", ends.size(),
                " entries; layout TND takes up to ", kMaxSequences, " sequences");
    TORCH_CHECK_NOT_IMPLEMENTED(ends.size() < 2 || ends.back() != 0, call.op, ": ", name,
                                " ends with 0; the emulator has no sequences that take no part");
  }
}

void RequireMask(const FusedAttention& call) {
  const int64_t mode = call.sparse_mode;
  TORCH_CHECK(mode >= 0 && mode <= 8 && mode != 5, call.op, ": sparse_mode is ", mode,
              "; with layout TND it has to be 0, 1, 2, 3, 4, 6, 7 or 8");
  TORCH_CHECK(mode == 0 || call.atten_mask.has_value(), call.op, ": atten_mask is None; sparse_mode ", mode,
              " needs a mask, without which every token sees every token");
  if (!call.atten_mask.has_value()) return;
  const at::Tensor& mask = *call.atten_mask;
  RequireDtype(Named(call, "atten_mask", mask), {at::kBool, at::kByte});
  TORCH_CHECK_NOT_IMPLEMENTED(mode >= 2 && mode <= 4, call.op, ": sparse_mode is ", mode,
                              " with an atten_mask; the emulator has 2, 3 and 4");
  TORCH_CHECK(mask.sizes() == c10::IntArrayRef({kMaskSize, kMaskSize}), call.op, ": atten_mask is ",
              Describe(mask), "; sparse_mode ", mode, " needs triu(ones(2048, 2048), 1)");
}

void Check(const FusedAttention& call) {
  RequireTensors(call);
  RequireHeads(call);
  RequireSequences(call);
  RequireMask(call);
}

// --- computing ---

struct Spans {
  std::vector<Place> queries;
  std::vector<Place> keys;
};

void Compute(const FusedAttention& call, const Spans& spans, const at::Tensor& out) {
  const at::Tensor query = OnHost(call.query);
  const at::Tensor key = OnHost(call.key);
  const at::Tensor value = OnHost(call.value);
  const at::Tensor host_out = OnHost(out);
  for (size_t b = 0; b < spans.queries.size(); ++b) {
    const TokenSpan rows = spans.queries[b].tokens;
    const TokenSpan keys = spans.keys[b].tokens;
    const auto tokens_of = [begin = keys.begin](const at::Tensor& tensor) {
      return [&tensor, begin](TokenSpan span) {
        return tensor.narrow(0, begin + span.begin, span.size()).unsqueeze(0);
      };
    };
    const auto rows_of = [&rows](const at::Tensor& tensor) {
      return tensor.narrow(0, rows.begin, rows.size()).unsqueeze(0);
    };
    Attend({rows_of(query), keys.size(), tokens_of(key), tokens_of(value),
            VisibilityOf(call, static_cast<int64_t>(b), spans.queries[b], keys.size())},
           {call.scale}, rows_of(host_out), {});
  }
}

// Only training reads a row's maximum and sum, and it is not emulated: they are NaN.
at::Tensor RowStatistics(const FusedAttention& call) {
  const at::Tensor statistics =
      EmptyOnDevice({call.query.size(0), call.num_heads, kRowStatistics}, at::kFloat);
  OnHost(statistics).fill_(std::numeric_limits<float>::quiet_NaN());
  return statistics;
}

// The size of a mask for dropout: a bit for each score.
int64_t NumScores(const FusedAttention& call, const Spans& spans) {
  int64_t scores = 0;
  for (size_t b = 0; b < spans.queries.size(); ++b)
    scores += spans.queries[b].tokens.size() * spans.keys[b].tokens.size();
  return scores * call.num_heads;
}

void FusionAttention(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Arguments arguments(op, *stack);
  FusedAttention call = Read(arguments);
  arguments.RefuseRest();
  Check(call);
  call.num_kv_heads = call.key.size(1);
  const std::vector<Place> queries = QueryPlaces(call);
  const Spans spans{queries, KeyPlaces(call, static_cast<int64_t>(queries.size()))};
  const HostScope scope(call.query.device());
  if (call.atten_mask.has_value()) RequireUpperTriangle(call);
  const at::Tensor out =
      EmptyOnDevice({call.query.size(0), call.num_heads, call.value.size(2)}, call.query.scalar_type());
  Compute(call, spans, out);
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::push(*stack, out, RowStatistics(call), RowStatistics(call),
                   EmptyOnDevice({0}, call.query.scalar_type()), int64_t{0}, int64_t{0},
                   NumScores(call, spans));
}

}  // namespace

void RegisterFusionAttention(Operators& npu) {
  npu.Implement("npu_fusion_attention", torch::CppFunction::makeFromBoxedFunction<&FusionAttention>());
}

}  // namespace ascend_emulator::aten
