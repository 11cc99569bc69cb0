// SPDX-License-Identifier: Apache-2.0
//
// How an entry point reports: the runtime's exceptions become CANN's codes, and the sentence is kept for the
// thread until aclGetRecentErrMsg asks for it.
#pragma once

#include <acl/acl.h>

#include <string>

#include "runtime/error.h"

namespace ascend_emulator {

// Keeps `code` and `sentence` as this thread's last error; returns `code`.
aclError Report(aclError code, const std::string& sentence);

// The code CANN gives for the error's fault, kept as above.
aclError Report(const Error& error);

// What every entry point runs its body in.
template <typename Body>
aclError Guarded(Body&& body) {
  try {
    body();
    return ACL_SUCCESS;
  } catch (const Error& error) {
    return Report(error);
  }
}

// Throws Error(kInvalidArgument) naming the call if one of its pointers is null.
template <typename... Pointers>
void RequireNonNull(const char* call, const Pointers*... pointers) {
  if ((... || (pointers == nullptr))) {
    throw Error(Fault::kInvalidArgument, std::string(call) + " was given a null pointer");
  }
}

}  // namespace ascend_emulator
