// SPDX-License-Identifier: Apache-2.0
//
// What can go wrong on the emulated device. The runtime throws; the acl layer turns a Fault into the code
// that CANN gives for it and keeps the sentence for aclGetRecentErrMsg.
#pragma once

#include <stdexcept>
#include <string>

namespace ascend_emulator {

enum class Fault {
  kInvalidArgument,
  kInvalidDevice,
  kNoCurrentDevice,
  kInvalidHandle,
  kNoSubscriber,
  kOutOfMemory,
  kNotAllocated,
  kTaskFailed,
  kEventNotTimed,
  kEventNotComplete,
  kForkedProcess,
  kBadConfiguration,
};

class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& what) : std::runtime_error(what), fault_(fault) {}

  Fault fault() const { return fault_; }

 private:
  Fault fault_;
};

}  // namespace ascend_emulator
