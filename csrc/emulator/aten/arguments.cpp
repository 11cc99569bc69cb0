// SPDX-License-Identifier: Apache-2.0
//
// Finds arguments by their names in the schema.
#include "arguments.h"

#include <c10/util/Exception.h>

namespace ascend_emulator::aten {

Arguments::Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
    : schema_(op.schema()), operator_(schema_.name().substr(schema_.name().find("::") + 2)) {
  const size_t count = schema_.arguments().size();
  values_.assign(stack.end() - static_cast<std::ptrdiff_t>(count), stack.end());
  taken_.assign(count, false);
}

at::Tensor Arguments::Tensor(const char* name) { return Take(name).toTensor(); }

std::optional<at::Tensor> Arguments::OptionalTensor(const char* name) {
  auto tensor = Take(name).toOptional<at::Tensor>();
  return tensor && tensor->defined() ? tensor : std::nullopt;
}

std::vector<at::Tensor> Arguments::Tensors(const char* name) { return Take(name).toTensorVector(); }

std::optional<std::vector<at::Tensor>> Arguments::OptionalTensors(const char* name) {
  const c10::IValue& value = Take(name);
  if (value.isNone()) return std::nullopt;
  auto tensors = value.toTensorVector();
  return tensors.empty() ? std::nullopt : std::optional(std::move(tensors));
}

std::optional<std::vector<int64_t>> Arguments::OptionalInts(const char* name) {
  const c10::IValue& value = Take(name);
  if (value.isNone()) return std::nullopt;
  if (value.isIntList()) return value.toIntVector();
  std::vector<int64_t> ints;
  for (const c10::SymInt& symbol : value.toSymIntVector())
    ints.push_back(symbol.guard_int(__FILE__, __LINE__));
  return ints;
}

std::string Arguments::Text(const char* name) { return Take(name).toStringRef(); }
int64_t Arguments::Int(const char* name) { return Take(name).toInt(); }
std::optional<int64_t> Arguments::OptionalInt(const char* name) { return Take(name).toOptional<int64_t>(); }
double Arguments::Float(const char* name) { return Take(name).toDouble(); }
bool Arguments::Bool(const char* name) { return Take(name).toBool(); }

void Arguments::RefuseRest() const {
  for (size_t i = 0; i < values_.size(); ++i) {
    const auto& argument = schema_.arguments()[i];
    if (taken_[i]) continue;
    const auto& standard = argument.default_value();
    const bool unset = values_[i].isNone() || (standard && !standard->isNone() && values_[i] == *standard);
    TORCH_CHECK_NOT_IMPLEMENTED(unset, operator_, ": the argument ", argument.name(),
                                " is not emulated; leave it at its default");
  }
}

const c10::IValue& Arguments::Take(const char* name) {
  const auto index = schema_.argumentIndexWithName(name);
  TORCH_INTERNAL_ASSERT(index.has_value(), operator_, " has no argument ", name);
  taken_[static_cast<size_t>(*index)] = true;
  return values_[static_cast<size_t>(*index)];
}

}  // namespace ascend_emulator::aten
