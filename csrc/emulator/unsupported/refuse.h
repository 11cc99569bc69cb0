// SPDX-License-Identifier: Apache-2.0
//
// What the generated refusals call. Only C types, since callers know these symbols by name alone.
#pragma once

namespace ascend_emulator {

// Prints that `symbol` is not emulated, keeps the sentence as the thread's last error, and returns
// ACL_ERROR_RT_FEATURE_NOT_SUPPORT.
int Refuse(const char* symbol);

// Prints the same and ends the process.
[[noreturn]] void RefuseAndAbort(const char* symbol);

}  // namespace ascend_emulator
