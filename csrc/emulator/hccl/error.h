// SPDX-License-Identifier: Apache-2.0
//
// The one exception of the emulated HCCL: a sentence for the reader and the code that HCCL's caller gets.
#pragma once

#include <stdexcept>
#include <string>

#include "third_party/hccl/inc/hccl/hccl_types.h"

namespace ascend_emulator::hccl {

class Error : public std::runtime_error {
 public:
  Error(HcclResult code, const std::string& message) : std::runtime_error(message), code_(code) {}

  HcclResult code() const { return code_; }

 private:
  HcclResult code_;
};

}  // namespace ascend_emulator::hccl
