// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embeddings: npu_rotary_mul, which is given cos and sin for every token, and atb's in-place
// _npu_rotary_embedding, which looks them up by position. Both compute in float32 and round once.
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "operators.h"
#include "require.h"
#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

constexpr const char* kRotaryMul = "npu_rotary_mul";
constexpr const char* kRotaryEmbedding = "_npu_rotary_embedding";

// Half: (-second half, first half). Interleave: neighbours (a, b) become (-b, a).
enum class Pairing { kHalf, kInterleave };

at::Tensor RotateByQuarterTurn(const at::Tensor& x, Pairing pairing) {
  if (pairing == Pairing::kHalf) {
    const auto halves = x.chunk(2, -1);
    return at::cat({halves[1].neg(), halves[0]}, -1);
  }
  const at::Tensor pairs = x.unflatten(-1, {-1, 2});
  return at::stack({pairs.select(-1, 1).neg(), pairs.select(-1, 0)}, -1).flatten(-2);
}

at::Tensor Rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, Pairing pairing) {
  return x.mul(cos).add_(RotateByQuarterTurn(x, pairing).mul_(sin));
}

Pairing PairingOf(std::string_view rotary_mode) {
  if (rotary_mode == "half") return Pairing::kHalf;
  TORCH_CHECK(rotary_mode == "interleave", kRotaryMul, ": rotary_mode is \"", rotary_mode,
              "\"; it has to be \"half\" or \"interleave\"");
  return Pairing::kInterleave;
}

void RequireBroadcastable(const Argument& angle, const at::Tensor& input) {
  bool fits = angle.tensor.dim() == input.dim() && angle.tensor.size(-1) == input.size(-1);
  for (int64_t dim = 0; fits && dim < input.dim(); ++dim) {
    fits = angle.tensor.size(dim) == input.size(dim) || angle.tensor.size(dim) == 1;
  }
  TORCH_CHECK(fits, angle.op, ": ", angle.name, " is ", Describe(angle.tensor), " for the input ",
              Describe(input),
              "; it needs as many dimensions, each of the same size or 1, the last of the same size");
}

at::Tensor RotaryMul(const at::Tensor& input, const at::Tensor& r1, const at::Tensor& r2,
                     std::string_view rotary_mode, const std::optional<at::Tensor>& rotate) {
  const Argument x{kRotaryMul, "input", input};
  RequireDtype(x, {at::kHalf, at::kBFloat16, at::kFloat});
  RequireSameDtype({kRotaryMul, "r1", r1}, x);
  RequireSameDtype({kRotaryMul, "r2", r2}, x);
  TORCH_CHECK((input.dim() == 3 || input.dim() == 4) && input.size(-1) % 2 == 0, kRotaryMul, ": input is ",
              Describe(input), "; it has to have 3 or 4 dimensions, the last of even size");
  RequireBroadcastable({kRotaryMul, "r1", r1}, input);
  TORCH_CHECK(r1.sizes() == r2.sizes(), kRotaryMul, ": r1 is ", Describe(r1), " and r2 is ", Describe(r2),
              "; both have to have the same shape");
  TORCH_CHECK_NOT_IMPLEMENTED(!rotate.has_value() || !rotate->defined(), kRotaryMul,
                              ": the argument rotate is not emulated; leave it None");
  const Pairing pairing = PairingOf(rotary_mode);
  const HostScope scope(input.device());
  at::Tensor result = EmptyOnDevice(input.sizes(), input.scalar_type());
  if (result.numel() == 0) return result;
  OnHost(result).copy_(
      Rotate(OnHost(input).to(at::kFloat), OnHost(r1).to(at::kFloat), OnHost(r2).to(at::kFloat), pairing));
  return result;
}

// A query or key of `num_tokens` tokens: any contiguous shape that holds whole heads for each of them.
void RequireHeads(const Argument& rows, int64_t num_tokens, int64_t head_size) {
  RequireContiguous(rows);
  const int64_t token_size = rows.tensor.numel() / std::max<int64_t>(num_tokens, 1);
  TORCH_CHECK(rows.tensor.numel() == token_size * num_tokens && token_size % head_size == 0, rows.op, ": ",
              rows.name, " is ", Describe(rows.tensor), "; it has to hold whole heads of ", head_size,
              " for each of ", num_tokens, " positions");
}

// Unlike a card, which keeps the table of the first call for the life of the process, this uses the one it is
// given.
void RotaryEmbedding(const at::Tensor& positions, at::Tensor& query, at::Tensor& key, int64_t head_size,
                     const at::Tensor& cos_sin_cache, bool is_neox_style) {
  const Argument q{kRotaryEmbedding, "query", query};
  RequireHalf(q);
  RequireSameDtype({kRotaryEmbedding, "key", key}, q);
  RequireSameDtype({kRotaryEmbedding, "cos_sin_cache", cos_sin_cache}, q);
  RequireDtype({kRotaryEmbedding, "positions", positions}, {at::kLong});
  RequireRank({kRotaryEmbedding, "cos_sin_cache", cos_sin_cache}, 2);
  TORCH_CHECK(head_size > 0 && head_size % 2 == 0 && cos_sin_cache.size(1) == head_size, kRotaryEmbedding,
              ": head_size is ", head_size, " and cos_sin_cache is ", Describe(cos_sin_cache),
              "; only whole heads are rotated, so its last size has to be the head size, and even");
  RequireHeads(q, positions.numel(), head_size);
  RequireHeads({kRotaryEmbedding, "key", key}, positions.numel(), head_size);
  if (positions.numel() == 0) return;
  const HostScope scope(query.device());
  const at::Tensor where = OnHost(positions).flatten();
  const int64_t lowest = where.min().item<int64_t>();
  const int64_t highest = where.max().item<int64_t>();
  TORCH_CHECK(lowest >= 0 && highest < cos_sin_cache.size(0), kRotaryEmbedding, ": positions run from ",
              lowest, " to ", highest, "; cos_sin_cache has rows 0 to ", cos_sin_cache.size(0) - 1,
              " (a card would read stray memory here)");
  const auto angles = OnHost(cos_sin_cache).index_select(0, where).to(at::kFloat).unsqueeze(1).chunk(2, -1);
  const auto over_pairs = [&](const at::Tensor& half) {
    return is_neox_style ? at::cat({half, half}, -1) : half.repeat_interleave(2, -1);
  };
  const at::Tensor cos = over_pairs(angles[0]);
  const at::Tensor sin = over_pairs(angles[1]);
  const Pairing pairing = is_neox_style ? Pairing::kHalf : Pairing::kInterleave;
  for (const at::Tensor& rows : {OnHost(query), OnHost(key)}) {
    const at::Tensor heads = rows.view({where.numel(), -1, head_size});
    heads.copy_(Rotate(heads.to(at::kFloat), cos, sin, pairing));
  }
}

}  // namespace

void RegisterRotary(Operators& npu, Operators& atb) {
  npu.Implement(kRotaryMul, TORCH_FN(RotaryMul));
  atb.Implement(kRotaryEmbedding, TORCH_FN(RotaryEmbedding));
}

}  // namespace ascend_emulator::aten
