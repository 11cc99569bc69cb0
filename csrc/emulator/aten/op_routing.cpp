// SPDX-License-Identifier: Apache-2.0
//
// The way of tokens through a mixture of experts: npu_moe_gating_top_k chooses each token's experts,
// npu_moe_init_routing_v2 sorts the tokens by expert, npu_moe_token_unpermute adds up what the experts made
// of them. What a card leaves undefined is NaN here, so that reading it shows.
//
// Source of the rules: tiling and documentation of the operators in the project ops-transformer.
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kGating = "npu_moe_gating_top_k";
constexpr const char* kInitRouting = "npu_moe_init_routing_v2";
constexpr const char* kUnpermute = "npu_moe_token_unpermute";
constexpr const char* kUnpermuteForward = "_npu_moe_token_unpermute";

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename... Results>
void Return(torch::jit::Stack* stack, const c10::OperatorHandle& op, Results&&... results) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::push(*stack, std::forward<Results>(results)...);
}

// --- npu_moe_gating_top_k ---

constexpr int64_t kMaxExperts = 2048;

enum class Normalisation : int64_t { kSoftmax = 0, kSigmoid = 1 };
enum class GroupScore : int64_t { kBest = 0, kSumOfBestTwo = 1 };

struct Gating {
  at::Tensor x;
  std::optional<at::Tensor> bias;
  int64_t k;
  int64_t kept_groups;
  int64_t groups;
  GroupScore group_score;
  Normalisation normalisation;
  double scale;
  double epsilon;

  int64_t NumExperts() const { return x.size(1); }
  bool ChoosesGroups() const { return groups != 1 && groups != NumExperts() && kept_groups != groups; }
};

void RequireExperts(const Gating& call) {
  const Argument x{kGating, "x", call.x};
  RequireDtype(x, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireRank(x, 2);
  TORCH_CHECK(call.NumExperts() <= kMaxExperts, kGating, ": x is ", Describe(call.x), "; a card takes up to ",
              kMaxExperts, " experts");
  if (!call.bias) return;
  RequireSameDtype({kGating, "bias", *call.bias}, x);
  TORCH_CHECK(call.bias->dim() == 1 && call.bias->size(0) == call.NumExperts(), kGating, ": bias is ",
              Describe(*call.bias), "; it has to hold one value for each expert of x, ", Describe(call.x));
}

void RequireGroups(const Gating& call) {
  TORCH_CHECK(call.groups > 0 && call.NumExperts() % call.groups == 0, kGating, ": group_count is ",
              call.groups, "; it has to divide the ", call.NumExperts(), " experts");
  TORCH_CHECK(call.kept_groups > 0 && call.kept_groups <= call.groups, kGating, ": k_group is ",
              call.kept_groups, "; it has to be 1 to group_count, ", call.groups);
  const int64_t size = call.NumExperts() / call.groups;
  TORCH_CHECK(call.group_score == GroupScore::kBest || size >= 2, kGating, ": group_select_mode is 1 and ",
              call.groups, " groups of ", size, " experts have no best two");
  TORCH_CHECK(call.k > 0 && call.k <= call.kept_groups * size, kGating, ": k is ", call.k,
              "; it has to be 1 to ", call.kept_groups * size, ", the experts of k_group groups");
  const int64_t padded = (size + 31) / 32 * 32;
  TORCH_CHECK(!call.ChoosesGroups() || call.groups * padded <= kMaxExperts, kGating, ": ", call.groups,
              " groups of ", size, " experts, padded to ", padded, ", are more than a card's ", kMaxExperts);
}

Gating ReadGating(Arguments& arguments) {
  Gating call{arguments.Tensor("x"),
              arguments.OptionalTensor("bias"),
              arguments.Int("k"),
              arguments.Int("k_group"),
              arguments.Int("group_count"),
              static_cast<GroupScore>(arguments.Int("group_select_mode")),
              static_cast<Normalisation>(arguments.Int("norm_type")),
              arguments.Float("routed_scaling_factor"),
              arguments.Float("eps")};
  TORCH_CHECK(call.group_score == GroupScore::kBest || call.group_score == GroupScore::kSumOfBestTwo, kGating,
              ": group_select_mode is ", static_cast<int64_t>(call.group_score), "; it has to be 0 or 1");
  TORCH_CHECK(call.normalisation == Normalisation::kSoftmax || call.normalisation == Normalisation::kSigmoid,
              kGating, ": norm_type is ", static_cast<int64_t>(call.normalisation), "; it has to be 0 or 1");
  return call;
}

// The places of the k largest of each row, among equals the first; int64 [rows, k].
at::Tensor Best(const at::Tensor& rows, int64_t k) {
  return std::get<1>(rows.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(-1, 0, k);
}

// `scores` with those of experts outside the best groups at minus infinity.
at::Tensor OfBestGroups(const Gating& call, const at::Tensor& scores) {
  const at::Tensor grouped = scores.unflatten(1, {call.groups, -1});
  const at::Tensor of_groups =
      call.group_score == GroupScore::kBest ? grouped.amax(-1) : std::get<0>(grouped.topk(2, -1)).sum(-1);
  const at::Tensor left_out =
      at::ones(of_groups.sizes(), at::kBool).scatter_(1, Best(of_groups, call.kept_groups), /*value=*/false);
  return grouped.masked_fill(left_out.unsqueeze(-1), -std::numeric_limits<double>::infinity()).flatten(1);
}

// Results: weights like x [rows, k], experts int32 [rows, k], and the normalised scores in float32, which are
// asked for with out_flag and undefined without.
void GatingTopK(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Arguments arguments(op, *stack);
  const Gating call = ReadGating(arguments);
  arguments.RefuseRest();
  RequireExperts(call);
  RequireGroups(call);
  const HostScope scope(call.x.device());
  const at::Tensor x = OnHost(call.x).to(at::kFloat);
  const at::Tensor scores =
      call.normalisation == Normalisation::kSoftmax ? at::softmax(x, -1) : at::sigmoid(x);
  const at::Tensor biased = call.bias ? scores.add(OnHost(*call.bias).to(at::kFloat)) : scores;
  const at::Tensor experts = Best(call.ChoosesGroups() ? OfBestGroups(call, biased) : biased, call.k);
  at::Tensor weights = scores.gather(1, experts);
  if (call.normalisation == Normalisation::kSigmoid) {
    weights = weights.div(weights.sum(-1, /*keepdim=*/true).add(call.epsilon));
  }
  Return(stack, op, ToDevice(weights.mul(call.scale).to(call.x.scalar_type())),
         ToDevice(experts.to(at::kInt)), ToDevice(at::full(x.sizes(), kNaN, at::kFloat)));
}

// --- npu_moe_init_routing_v2 ---

struct Span {
  int64_t begin;
  int64_t end;
};

Span ReadRange(Arguments& arguments, int64_t num_experts) {
  const auto range = arguments.OptionalInts("active_expert_range").value_or(std::vector<int64_t>{});
  const bool valid = range.size() == 2 && 0 <= range[0] && range[0] < range[1] && range[1] <= num_experts;
  TORCH_CHECK(valid, kInitRouting, ": active_expert_range is ", c10::IntArrayRef(range),
              "; it has to be [first, last + 1] within expert_num, ", num_experts);
  return {range[0], range[1]};
}

// Of what the schema offers, a card takes the dropless form with counted tokens.
void RequireDropless(Arguments& arguments, int64_t num_places) {
  TORCH_CHECK(arguments.Int("active_num") == num_places, kInitRouting, ": active_num is ",
              arguments.Int("active_num"), "; it has to be the number of elements of expert_idx, ",
              num_places);
  TORCH_CHECK(arguments.Int("drop_pad_mode") == 0, kInitRouting, ": drop_pad_mode has to be 0");
  TORCH_CHECK(arguments.Bool("expert_tokens_num_flag"), kInitRouting,
              ": expert_tokens_num_flag has to be True");
  const int64_t kind = arguments.Int("expert_tokens_num_type");
  TORCH_CHECK(kind == 1 || kind == 2, kInitRouting, ": expert_tokens_num_type is ", kind,
              "; it has to be 1 (counts) or 2 (pairs)");
  TORCH_CHECK_NOT_IMPLEMENTED(kind == 1, kInitRouting, ": expert_tokens_num_type 2 is not emulated; use 1");
}

void RequireExpertsInRange(const at::Tensor& experts, int64_t num_experts) {
  if (experts.numel() == 0) return;
  const int64_t lowest = experts.min().item<int64_t>();
  const int64_t highest = experts.max().item<int64_t>();
  TORCH_CHECK(lowest >= 0 && highest < num_experts, kInitRouting, ": expert_idx runs from ", lowest, " to ",
              highest, "; it has to be 0 to expert_num - 1, ", num_experts - 1,
              " (a card would touch stray memory here)");
}

// Results: the rows of x sorted by expert [T*K, hidden], the place of each choice among them int32 [T*K], the
// number of rows of each active expert int64, and no scale. A choice outside the active range has place -1.
void InitRouting(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Arguments arguments(op, *stack);
  const at::Tensor x = arguments.Tensor("x");
  const at::Tensor expert_idx = arguments.Tensor("expert_idx");
  const int64_t num_experts = arguments.Int("expert_num");
  const Span active = ReadRange(arguments, num_experts);
  RequireDropless(arguments, expert_idx.numel());
  arguments.RefuseRest();
  RequireDtype({kInitRouting, "x", x}, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireRank({kInitRouting, "x", x}, 2);
  RequireDtype({kInitRouting, "expert_idx", expert_idx}, {at::kInt});
  TORCH_CHECK(expert_idx.dim() == 2 && expert_idx.size(0) == x.size(0), kInitRouting, ": expert_idx is ",
              Describe(expert_idx), "; it has to be [tokens, choices] for the tokens of x, ", Describe(x));
  const HostScope scope(x.device());
  const at::Tensor experts = OnHost(expert_idx).flatten().to(at::kLong);
  RequireExpertsInRange(experts, num_experts);

  const at::Tensor rows = OnHost(x);
  const at::Tensor expanded = at::full({experts.numel(), rows.size(1)}, kNaN, rows.options());
  const at::Tensor places = at::full({experts.numel()}, -1, at::kInt);
  const at::Tensor counts = at::zeros({active.end - active.begin}, at::kLong);
  const at::Tensor order = experts.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto* expert_of = experts.const_data_ptr<int64_t>();
  const auto* choices = order.const_data_ptr<int64_t>();
  int64_t filled = 0;
  for (int64_t i = 0; i < order.numel(); ++i) {
    const int64_t expert = expert_of[choices[i]];
    if (expert < active.begin || expert >= active.end) continue;
    expanded[filled].copy_(rows[choices[i] / expert_idx.size(1)]);
    places.mutable_data_ptr<int32_t>()[choices[i]] = static_cast<int32_t>(filled++);
    counts.mutable_data_ptr<int64_t>()[expert - active.begin] += 1;
  }
  Return(stack, op, ToDevice(expanded), ToDevice(places), ToDevice(counts),
         ToDevice(at::full({experts.numel()}, kNaN, at::kFloat)));
}

// --- npu_moe_token_unpermute ---

constexpr int64_t kMaxChoices = 512;

void RequireRowIndices(const at::Tensor& indices, int64_t num_rows) {
  if (indices.numel() == 0) return;
  const int64_t lowest = indices.min().item<int64_t>();
  const int64_t highest = indices.max().item<int64_t>();
  TORCH_CHECK(lowest >= 0 && highest < num_rows, kUnpermute, ": sorted_indices runs from ", lowest, " to ",
              highest, "; permuted_tokens has rows 0 to ", num_rows - 1,
              " (a card would read stray memory here)");
}

// out[i] = sum over j of probs[i, j] * permuted_tokens[sorted_indices[i * K + j]]; float32 inside.
at::Tensor Unpermute(const at::Tensor& permuted_tokens, const at::Tensor& sorted_indices,
                     const std::optional<at::Tensor>& probs, bool padded_mode,
                     at::OptionalIntArrayRef restore_shape) {
  RequireDtype({kUnpermute, "permuted_tokens", permuted_tokens}, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireRank({kUnpermute, "permuted_tokens", permuted_tokens}, 2);
  RequireDtype({kUnpermute, "sorted_indices", sorted_indices}, {at::kInt});
  RequireRank({kUnpermute, "sorted_indices", sorted_indices}, 1);
  TORCH_CHECK(!padded_mode && !restore_shape.has_value(), kUnpermute,
              ": padded_mode has to be False and restore_shape None");
  int64_t num_choices = 1;
  if (probs.has_value() && probs->defined()) {
    RequireDtype({kUnpermute, "probs", *probs}, {at::kHalf, at::kBFloat16, at::kFloat});
    RequireRank({kUnpermute, "probs", *probs}, 2);
    num_choices = probs->size(1);
    TORCH_CHECK(probs->numel() == sorted_indices.numel() && num_choices > 0 && num_choices <= kMaxChoices,
                kUnpermute, ": probs is ", Describe(*probs),
                "; it has to hold [tokens, choices], one for each of ", sorted_indices.numel(),
                " sorted_indices, with up to ", kMaxChoices, " choices");
  }
  const HostScope scope(permuted_tokens.device());
  const at::Tensor indices = OnHost(sorted_indices).to(at::kLong);
  RequireRowIndices(indices, permuted_tokens.size(0));
  at::Tensor chosen =
      OnHost(permuted_tokens).index_select(0, indices).to(at::kFloat).unflatten(0, {-1, num_choices});
  if (const auto weights = OnHost(probs)) chosen = chosen.mul(weights->to(at::kFloat).unsqueeze(-1));
  return ToDevice(chosen.sum(1).to(permuted_tokens.scalar_type()));
}

// What torch_npu's autograd calls in its place, for a result and what it keeps for the gradient.
std::tuple<at::Tensor, at::Tensor> UnpermuteForward(const at::Tensor& permuted_tokens,
                                                    const at::Tensor& sorted_indices,
                                                    const std::optional<at::Tensor>& probs, bool padded_mode,
                                                    at::OptionalIntArrayRef restore_shape) {
  return {Unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape), permuted_tokens};
}

}  // namespace

void RegisterRouting(Operators& npu) {
  using torch::CppFunction;
  npu.Implement(kGating, CppFunction::makeFromBoxedFunction<&GatingTopK>());
  npu.Implement(kInitRouting, CppFunction::makeFromBoxedFunction<&InitRouting>());
  npu.Implement(kUnpermute, TORCH_FN(Unpermute));
  npu.Implement(kUnpermuteForward, TORCH_FN(UnpermuteForward));
}

}  // namespace ascend_emulator::aten
