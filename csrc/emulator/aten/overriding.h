// SPDX-License-Identifier: Apache-2.0
//
// Replacing torch_npu's kernels is the purpose of this library, so the dispatcher's warning about it is
// noise.
#pragma once

#include <c10/util/Exception.h>

namespace ascend_emulator::aten {

/// While it lives, warnings of this thread that a registered kernel is overridden are dropped; all others
/// pass.
class QuietOverrides : private c10::WarningHandler {
 public:
  QuietOverrides() : outer_(c10::WarningUtils::get_warning_handler()), guard_(this) {}

 private:
  void process(const c10::Warning& warning) override {
    if (warning.msg().find("Overriding a previously registered kernel") == std::string::npos)
      outer_->process(warning);
  }

  c10::WarningHandler* outer_;
  c10::WarningUtils::WarningHandlerGuard guard_;
};

}  // namespace ascend_emulator::aten
