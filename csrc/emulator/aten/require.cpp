// SPDX-License-Identifier: Apache-2.0
//
// The wording of what operators require of their tensors.
#include "require.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string_view>

#include "tensors.h"

namespace ascend_emulator::aten {
namespace {

// The names Python uses; c10::toString says "Half" and "Int".
std::string DtypeName(c10::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

std::string Join(std::initializer_list<c10::ScalarType> dtypes) {
  std::string text;
  for (const c10::ScalarType dtype : dtypes) text += (text.empty() ? "" : " or ") + DtypeName(dtype);
  return text;
}

[[noreturn]] void Fail(const Argument& argument, const std::string& required) {
  TORCH_CHECK(false, argument.op, ": ", argument.name, " is ", Describe(argument.tensor), "; it has to be ",
              required);
}

}  // namespace

std::string Describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  std::ostringstream text;
  text << DtypeName(tensor.scalar_type()) << tensor.sizes() << " on " << tensor.device();
  return text.str();
}

bool Float32Allowed() {
  static const bool allowed = [] {
    const char* value = std::getenv("ASCEND_EMULATOR_ALLOW_FP32");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return allowed;
}

void RequireOnDevice(const Argument& argument) {
  if (!IsOnDevice(argument.tensor)) Fail(argument, "on the npu");
}

void RequireRank(const Argument& argument, int64_t rank) {
  if (argument.tensor.dim() != rank) Fail(argument, std::to_string(rank) + "-dimensional");
}

void RequireContiguous(const Argument& argument) {
  if (argument.tensor.is_contiguous()) return;
  std::ostringstream strides;
  strides << argument.tensor.strides();
  TORCH_CHECK(false, argument.op, ": ", argument.name, " is ", Describe(argument.tensor), " with strides ",
              strides.str(), "; it has to be contiguous, since a card would write to a copy of it");
}

void RequireDtype(const Argument& argument, std::initializer_list<c10::ScalarType> dtypes) {
  RequireOnDevice(argument);
  if (std::find(dtypes.begin(), dtypes.end(), argument.tensor.scalar_type()) == dtypes.end()) {
    Fail(argument, Join(dtypes));
  }
}

void RequireHalf(const Argument& argument) {
  if (Float32Allowed()) {
    RequireDtype(argument, {at::kHalf, at::kBFloat16, at::kFloat});
  } else {
    RequireDtype(argument, {at::kHalf, at::kBFloat16});
  }
}

void RequireSameDtype(const Argument& argument, const Argument& other) {
  RequireOnDevice(argument);
  if (argument.tensor.scalar_type() != other.tensor.scalar_type()) {
    Fail(argument, DtypeName(other.tensor.scalar_type()) + " as " + other.name + " is");
  }
}

}  // namespace ascend_emulator::aten
