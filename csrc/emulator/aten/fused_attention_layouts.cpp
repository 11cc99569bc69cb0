// SPDX-License-Identifier: Apache-2.0
//
// The layouts of npu_fused_infer_attention_score as views in one order, so that what computes knows only that
// one.
#include <c10/util/Exception.h>

#include "fused_attention.h"

namespace ascend_emulator::aten {

std::pair<Layout, Layout> LayoutsOf(const std::string& op, const std::string& input_layout) {
  if (input_layout == "TND") return {Layout::kTnd, Layout::kTnd};
  if (input_layout == "BSH") return {Layout::kBsh, Layout::kBsh};
  if (input_layout == "BSND") return {Layout::kBsnd, Layout::kBsnd};
  if (input_layout == "BNSD") return {Layout::kBnsd, Layout::kBnsd};
  if (input_layout == "BNSD_BSND") return {Layout::kBnsd, Layout::kBsnd};
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": input_layout is \"", input_layout,
                              "\"; the emulator has TND, BSH, BSND, BNSD and BNSD_BSND");
}

at::Tensor AsBatch(const at::Tensor& tensor, Layout layout, int64_t heads) {
  switch (layout) {
    case Layout::kTnd:
      return tensor.unsqueeze(0);
    case Layout::kBsh:
      return tensor.unflatten(2, {heads, -1});
    case Layout::kBsnd:
      return tensor;
    case Layout::kBnsd:
      return tensor.transpose(1, 2);
  }
  TORCH_INTERNAL_ASSERT(false, "a layout without a view");
}

at::Tensor AsPages(const at::Tensor& cache, int64_t heads) {
  return cache.dim() == 3 ? cache.unflatten(2, {heads, -1}) : cache.transpose(1, 2);
}

}  // namespace ascend_emulator::aten
