// SPDX-License-Identifier: Apache-2.0
//
// libopapi: aclnnConstantPadNd, with which ProcessGroupHCCL brings the tensors of an all-gather to whole
// blocks of 32 bytes. It pads with zeros, and nothing else is emulated: PyTorch's own constant_pad_nd does
// not come here.
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "acl/error.h"
#include "opapi/meta.h"
#include "runtime/stream.h"

using ascend_emulator::Error;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::Stream;

namespace {

constexpr int kParameterInvalid = 161002;  // aclnn's ACLNN_ERR_PARAM_INVALID

struct Pad {
  aclTensor input;
  aclTensor output;
  /// For each dimension, how many zeros come before the input.
  std::vector<int64_t> before;
  size_t element_bytes;

  std::byte* AddressIn(const aclTensor& tensor) const {
    return static_cast<std::byte*>(tensor.data) + tensor.offset * static_cast<int64_t>(element_bytes);
  }
};

/// Fills `output` along `dimension` and those behind it; `input` is null where there is only padding.
void Fill(const Pad& pad, size_t dimension, const std::byte* input, std::byte* output) {
  if (dimension == pad.output.sizes.size()) {
    if (input == nullptr) {
      std::memset(output, 0, pad.element_bytes);
    } else {
      std::memcpy(output, input, pad.element_bytes);
    }
    return;
  }
  const auto element_bytes = static_cast<int64_t>(pad.element_bytes);
  for (int64_t at = 0; at < pad.output.sizes[dimension]; ++at) {
    const int64_t from = at - pad.before[dimension];
    const bool inside = input != nullptr && from >= 0 && from < pad.input.sizes[dimension];
    const std::byte* source = inside ? input + from * pad.input.strides[dimension] * element_bytes : nullptr;
    Fill(pad, dimension + 1, source, output + at * pad.output.strides[dimension] * element_bytes);
  }
}

/// Why the operator cannot do what is asked for.
std::optional<std::string> Objection(const aclTensor& self, const aclIntArray& pad, const aclScalar& value,
                                     const aclTensor& out) {
  if (value.bits != 0)
    return "pads with something else than zero, which is not emulated; see docs/emulator.md";
  if (self.type != out.type || self.sizes.size() != out.sizes.size())
    return "was given tensors that do not match";
  if (ElementBytes(self.type) == 0) return "was given a type that is not emulated; see docs/emulator.md";
  if (pad.values.size() % 2 != 0 || pad.values.size() / 2 > self.sizes.size())
    return "was given a bad list of pads";
  std::vector<int64_t> sizes = self.sizes;
  for (size_t i = 0; i < pad.values.size(); i += 2) {
    if (pad.values[i] < 0 || pad.values[i + 1] < 0)
      return "crops, which is not emulated; see docs/emulator.md";
    sizes[sizes.size() - 1 - i / 2] += pad.values[i] + pad.values[i + 1];
  }
  if (sizes != out.sizes) return "was given a result of another size than the padded input's";
  return std::nullopt;
}

}  // namespace

struct aclOpExecutor {
  Pad pad;
};

extern "C" {

int aclnnConstantPadNdGetWorkspaceSize(const aclTensor* self, const aclIntArray* pad, const aclScalar* value,
                                       aclTensor* out, uint64_t* workspace_bytes, aclOpExecutor** executor) {
  const std::optional<std::string> objection = Objection(*self, *pad, *value, *out);
  if (objection) {
    std::fprintf(stderr, "ascend emulator: aclnnConstantPadNd %s\n", objection->c_str());
    return Report(kParameterInvalid, "aclnnConstantPadNd " + *objection);
  }
  std::vector<int64_t> before(self->sizes.size(), 0);
  // The list begins with the last dimension.
  for (size_t i = 0; i < pad->values.size(); i += 2) before[before.size() - 1 - i / 2] = pad->values[i];
  *workspace_bytes = 0;
  *executor = new aclOpExecutor{{*self, *out, before, ElementBytes(self->type)}};
  return 0;
}

/// Takes the executor over, as every aclnn operator does.
int aclnnConstantPadNd(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  const std::shared_ptr<aclOpExecutor> owned(executor);
  return Guarded([&] {
    Stream::From(stream).Enqueue([owned] {
      const Pad& pad = owned->pad;
      Fill(pad, 0, pad.AddressIn(pad.input), pad.AddressIn(pad.output));
    });
  });
}

}  // extern "C"
