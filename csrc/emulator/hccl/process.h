// SPDX-License-Identifier: Apache-2.0
//
// Who a rank is to the other ranks of its host, and whether it is still there.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace ascend_emulator::hccl {

/// A process, told apart from a later one that got the same number. Seen within one PID namespace.
struct ProcessIdentity {
  pid_t pid = 0;
  /// When it started, in clock ticks since boot: field 22 of /proc/PID/stat (man 5 proc).
  uint64_t start_ticks = 0;

  static ProcessIdentity Self();

  /// False once the process has exited, also while nobody has waited for it (a zombie).
  bool Alive() const;
};

}  // namespace ascend_emulator::hccl
