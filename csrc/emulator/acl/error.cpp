// SPDX-License-Identifier: Apache-2.0
#include "acl/error.h"

namespace ascend_emulator {
namespace {

struct LastError {
  aclError code = ACL_SUCCESS;
  std::string sentence;
  // What aclGetRecentErrMsg returned stays valid until the thread asks again.
  std::string handed_out;
};

thread_local LastError last_error;

aclError CodeOf(Fault fault) {
  switch (fault) {
    case Fault::kInvalidArgument:
      return ACL_ERROR_RT_PARAM_INVALID;
    case Fault::kInvalidDevice:
      return ACL_ERROR_RT_INVALID_DEVICEID;
    case Fault::kNoCurrentDevice:
      return ACL_ERROR_RT_CONTEXT_NULL;
    case Fault::kInvalidHandle:
      return ACL_ERROR_RT_INVALID_HANDLE;
    case Fault::kNoSubscriber:
      return ACL_ERROR_RT_STREAM_NO_CB_REG;
    case Fault::kOutOfMemory:
      return ACL_ERROR_RT_MEMORY_ALLOCATION;
    case Fault::kNotAllocated:
      return ACL_ERROR_RT_MEMORY_FREE;
    case Fault::kTaskFailed:
      return ACL_ERROR_RT_AICORE_EXCEPTION;
    case Fault::kEventNotTimed:
      return ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID;
    case Fault::kEventNotComplete:
      return ACL_ERROR_RT_EVENT_NOT_COMPLETE;
    case Fault::kForkedProcess:
      return ACL_ERROR_RT_DRV_INTERNAL_ERROR;
    case Fault::kBadConfiguration:
      return ACL_ERROR_INVALID_PARAM;
  }
  return ACL_ERROR_INTERNAL_ERROR;
}

}  // namespace

aclError Report(aclError code, const std::string& sentence) {
  last_error.code = code;
  last_error.sentence = "ascend emulator: " + sentence;
  return code;
}

aclError Report(const Error& error) { return Report(CodeOf(error.fault()), error.what()); }

}  // namespace ascend_emulator

using ascend_emulator::last_error;

extern "C" {

// As in CANN, the message is handed out once; null if there is none.
const char* aclGetRecentErrMsg() {
  if (last_error.sentence.empty()) return nullptr;
  last_error.handed_out = std::move(last_error.sentence);
  last_error.sentence.clear();
  return last_error.handed_out.c_str();
}

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return last_error.code; }

aclError aclrtGetLastError(aclrtLastErrLevel) {
  const aclError code = last_error.code;
  last_error.code = ACL_SUCCESS;
  return code;
}

}  // extern "C"
