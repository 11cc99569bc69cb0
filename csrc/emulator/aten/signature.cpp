// SPDX-License-Identifier: Apache-2.0
#include "signature.h"

#include <set>
#include <string>

namespace ascend_emulator::aten {
namespace {

bool HoldsTensors(const c10::Type& type) {
  if (type.kind() == c10::TypeKind::TensorType) return true;
  if (type.kind() != c10::TypeKind::OptionalType && type.kind() != c10::TypeKind::ListType) return false;
  return HoldsTensors(*type.containedType(0));
}

bool IsOptionally(const c10::Type& type, c10::TypeKind kind) {
  if (type.kind() == c10::TypeKind::OptionalType) return IsOptionally(*type.containedType(0), kind);
  return type.kind() == kind;
}

Passing PassingOf(const c10::Argument& argument) {
  const c10::Type& type = *argument.type();
  if (HoldsTensors(type)) return Passing::kTensors;
  if (IsOptionally(type, c10::TypeKind::GeneratorType)) return Passing::kGenerator;
  if (IsOptionally(type, c10::TypeKind::DeviceObjType)) return Passing::kDevice;
  if (argument.name() == "pin_memory") return Passing::kPinMemory;
  return Passing::kAsIs;
}

bool IsWritten(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

std::optional<size_t> ReturnedArgument(const c10::FunctionSchema& schema, const c10::Argument& result) {
  if (!IsWritten(result)) return std::nullopt;
  const std::vector<c10::Argument>& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (IsWritten(arguments[i]) &&
        arguments[i].alias_info()->beforeSets() == result.alias_info()->beforeSets()) {
      return i;
    }
  }
  return std::nullopt;
}

bool TakesHostTensors(const std::string& name) {
  static const std::set<std::string> names{
      "aten::index",
      "aten::index_put",
      "aten::index_put_",
      "aten::_index_put_impl_",
      "aten::_pack_padded_sequence",  // lengths
      "aten::_pad_packed_sequence",   // batch sizes
      "aten::_ctc_loss",              // lengths
  };
  return names.count(name) != 0;
}

}  // namespace

Signature::Signature(const c10::FunctionSchema& schema)
    : takes_host_tensors(TakesHostTensors(schema.name())) {
  for (const c10::Argument& argument : schema.arguments()) {
    arguments.push_back({PassingOf(argument), IsWritten(argument)});
  }
  for (const c10::Argument& result : schema.returns()) {
    returned_argument.push_back(ReturnedArgument(schema, result));
  }
}

}  // namespace ascend_emulator::aten
