// SPDX-License-Identifier: Apache-2.0
//
// The profiler's hooks that torch_npu links to. It registers a callback to be told when profiling is switched
// on; nothing here ever switches it on, so the callback is never called and a report is a caller's mistake.
#include <acl/acl.h>
#include <profiling/aprof_pub.h>

#include <chrono>

#include "acl/error.h"

namespace {

int32_t NotProfiling(const char* call) {
  return ascend_emulator::Report(ACL_ERROR_PROF_NOT_RUN,
                                 std::string(call) + " was called and no profiler runs");
}

}  // namespace

extern "C" {

// Never calls back, because no profiler ever starts.
int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }

// No profiler runs, so there is nobody to report to: ACL_ERROR_PROF_NOT_RUN, as for the two below.
int32_t MsprofReportApi(uint32_t, const MsprofApi*) { return NotProfiling("MsprofReportApi"); }

int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) {
  return NotProfiling("MsprofReportCompactInfo");
}

int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) {
  return NotProfiling("MsprofReportAdditionalInfo");
}

// FNV-1a: any hash will do, as long as equal strings have equal hashes.
uint64_t MsprofGetHashId(const char* text, size_t length) {
  uint64_t hash = 14695981039346656037U;
  for (size_t i = 0; i < length; ++i) hash = (hash ^ static_cast<unsigned char>(text[i])) * 1099511628211U;
  return hash;
}

uint64_t MsprofSysCycleTime() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

}  // extern "C"
