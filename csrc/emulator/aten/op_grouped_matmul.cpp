// SPDX-License-Identifier: Apache-2.0
//
// npu_grouped_matmul in the form that experts need: one tensor of rows, sorted by group, one of weights with
// a matrix for each group, one result. Rows that no group covers are undefined on a card and NaN here.
//
// Source of the rules: the table of types and limits in torch_npu's documentation of the operator.
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <c10/util/Exception.h>

#include <limits>
#include <vector>

#include "arguments.h"
#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kGroupedMatmul = "npu_grouped_matmul";

constexpr int64_t kMaxGroups = 1024;
constexpr int64_t kMaxInnerSize = 65535;

enum class GroupList : int64_t { kCumulative = 0, kCounts = 1 };

struct Call {
  at::Tensor x;
  at::Tensor weight;
  std::optional<at::Tensor> bias;
  at::Tensor group_list;
  GroupList group_list_type;
};

at::Tensor OnlyOne(const char* name, const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensors.size() == 1, kGroupedMatmul, ": ", name, " has ", tensors.size(),
                              " tensors; one for all groups is emulated");
  return tensors[0];
}

Call Read(Arguments& arguments) {
  const auto group_type = arguments.OptionalInt("group_type");
  TORCH_CHECK(group_type.has_value(), kGroupedMatmul,
              ": group_type has to be given where group_list is a tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(*group_type == 0, kGroupedMatmul, ": group_type ", *group_type,
                              " is not emulated; use 0, which groups the rows of x");
  const int64_t split_item = arguments.OptionalInt("split_item").value_or(0);
  TORCH_CHECK_NOT_IMPLEMENTED(split_item == 2 || split_item == 3, kGroupedMatmul, ": split_item ", split_item,
                              " is not emulated; use 2 or 3, which give one result for all groups");
  const int64_t kind = arguments.OptionalInt("group_list_type").value_or(0);
  TORCH_CHECK(kind == 0 || kind == 1, kGroupedMatmul, ": group_list_type is ", kind,
              "; it has to be 0 (sums) or 1 (counts) for these types");
  const auto bias = arguments.OptionalTensors("bias");
  const auto group_list = arguments.OptionalTensor("group_list");
  TORCH_CHECK(group_list.has_value(), kGroupedMatmul, ": group_list has to be given for one tensor of rows");
  Call call{OnlyOne("x", arguments.Tensors("x")), OnlyOne("weight", arguments.Tensors("weight")),
            std::nullopt, *group_list, static_cast<GroupList>(kind)};
  if (bias) call.bias = OnlyOne("bias", *bias);
  return call;
}

bool IsDense(const at::Tensor& matrices) {
  return matrices.is_contiguous() || matrices.transpose(-1, -2).is_contiguous();
}

void RequireShapes(const Call& call) {
  const Argument x{kGroupedMatmul, "x", call.x};
  const Argument weight{kGroupedMatmul, "weight", call.weight};
  RequireDtype(x, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireRank(x, 2);
  RequireContiguous(x);
  RequireSameDtype(weight, x);
  RequireRank(weight, 3);
  TORCH_CHECK(IsDense(call.weight), kGroupedMatmul, ": weight is ", Describe(call.weight),
              "; it has to be contiguous, or the transposed view of a contiguous tensor");
  TORCH_CHECK(call.weight.size(1) == call.x.size(1), kGroupedMatmul, ": weight is ", Describe(call.weight),
              "; its rows have to be the columns of x, ", Describe(call.x));
  for (const Argument& argument : {x, weight}) {
    TORCH_CHECK(argument.tensor.size(-1) <= kMaxInnerSize, kGroupedMatmul, ": ", argument.name, " is ",
                Describe(argument.tensor), "; the last size may be ", kMaxInnerSize, " at most");
  }
}

void RequireBias(const Call& call) {
  if (!call.bias) return;
  // The sum is in float32; of the narrow types float16 alone has a bias of its own kind.
  RequireDtype({kGroupedMatmul, "bias", *call.bias},
               {call.x.scalar_type() == at::kHalf ? at::kHalf : at::kFloat});
  TORCH_CHECK(call.bias->dim() == 2 && call.bias->size(0) == call.weight.size(0) &&
                  call.bias->size(1) == call.weight.size(2),
              kGroupedMatmul, ": bias is ", Describe(*call.bias),
              "; it has to hold a row for each matrix of weight, ", Describe(call.weight));
}

// The number of rows of each group.
std::vector<int64_t> ReadCounts(const Call& call) {
  const at::Tensor list = OnHost(call.group_list).contiguous();
  const auto* entries = list.const_data_ptr<int64_t>();
  std::vector<int64_t> counts(entries, entries + list.numel());
  if (call.group_list_type == GroupList::kCumulative) {
    for (size_t group = counts.size(); group-- > 1;) counts[group] -= counts[group - 1];
  }
  int64_t rows = 0;
  for (const int64_t count : counts) {
    rows += count;
    TORCH_CHECK(count >= 0 && rows <= call.x.size(0), kGroupedMatmul, ": group_list gives groups of ",
                c10::IntArrayRef(counts), " rows; x has ", call.x.size(0),
                " (a card would touch stray memory here)");
  }
  return counts;
}

void GroupedMatmul(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Arguments arguments(op, *stack);
  const Call call = Read(arguments);
  arguments.RefuseRest();
  RequireShapes(call);
  RequireBias(call);
  RequireDtype({kGroupedMatmul, "group_list", call.group_list}, {at::kLong});
  const int64_t groups = call.weight.size(0);
  TORCH_CHECK(call.group_list.dim() == 1 && call.group_list.size(0) == groups && groups <= kMaxGroups,
              kGroupedMatmul, ": group_list is ", Describe(call.group_list),
              "; it has to hold a number for each matrix of weight, ", Describe(call.weight), ", and up to ",
              kMaxGroups);
  const HostScope scope(call.x.device());
  const std::vector<int64_t> counts = ReadCounts(call);
  const at::Tensor x = OnHost(call.x);
  const at::Tensor weight = OnHost(call.weight);
  const at::Tensor y =
      at::full({x.size(0), weight.size(2)}, std::numeric_limits<double>::quiet_NaN(), x.options());
  int64_t first = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t count = counts[static_cast<size_t>(group)];
    if (count == 0) continue;
    at::Tensor product = at::matmul(x.narrow(0, first, count).to(at::kFloat), weight[group].to(at::kFloat));
    if (call.bias) product = product.add(OnHost(*call.bias)[group].to(at::kFloat));
    y.narrow(0, first, count).copy_(product);
    first += count;
  }
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::push(*stack, std::vector<at::Tensor>{ToDevice(y)});
}

}  // namespace

void RegisterGroupedMatmul(Operators& npu) {
  npu.Implement(kGroupedMatmul, torch::CppFunction::makeFromBoxedFunction<&GroupedMatmul>());
}

}  // namespace ascend_emulator::aten
