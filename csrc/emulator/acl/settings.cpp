// SPDX-License-Identifier: Apache-2.0
//
// Settings of the device. Each is accepted where the emulator already behaves as it asks, and refused
// elsewhere.
#include <acl/acl.h>

#include <map>
#include <mutex>
#include <string>

#include "acl/error.h"
#include "runtime/device.h"

namespace {

using ascend_emulator::Device;
using ascend_emulator::Error;
using ascend_emulator::Fault;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::RequireNonNull;
using ascend_emulator::Stream;

std::mutex options_mutex;

std::map<aclSysParamOpt, int64_t>& Options() {
  static auto& options = *new std::map<aclSysParamOpt, int64_t>;
  return options;
}

}  // namespace

extern "C" {

// CPU kernels are IEEE: infinities and NaN are kept. A program that asks for saturation gets a refusal.
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
  if (mode == ACL_RT_OVERFLOW_MODE_INFNAN) return ACL_SUCCESS;
  return Report(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "saturating arithmetic is not emulated; leave INF_NAN_MODE_ENABLE at 1");
}

// All of these ask for results that repeat, or for kernels with checks. Results here always repeat, so each
// is kept to be read back and changes nothing else.
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  std::lock_guard lock(options_mutex);
  Options()[option] = value;
  return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  return Guarded([&] {
    RequireNonNull("aclrtGetSysParamOpt", value);
    std::lock_guard lock(options_mutex);
    *value = Options()[option];
  });
}

// The same options for one context; no call of torch_npu reads them back.
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) {
  return Guarded([] { Device::Current(); });
}

// Limits on how long an operator may take on the card's cores, which are not there.
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout_us, uint64_t* actual_timeout_us) {
  return Guarded([&] {
    RequireNonNull("aclrtSetOpExecuteTimeOutV2", actual_timeout_us);
    *actual_timeout_us = timeout_us;
  });
}

// A stream of the emulator always stops at its first failed task.
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) {
  return Guarded([&] {
    Stream::From(stream);
    if (mode != ACL_STOP_ON_FAILURE) {
      throw Error(Fault::kInvalidArgument, "streams that go on after a failed task are not emulated");
    }
  });
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) {
  return Guarded([&] {
    Stream::From(stream);
    if (flag != 0) throw Error(Fault::kInvalidArgument, "the overflow detection of streams is not emulated");
  });
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t* flag) {
  return Guarded([&] {
    RequireNonNull("aclrtGetStreamOverflowSwitch", flag);
    Stream::From(stream);
    *flag = 0;
  });
}

}  // extern "C"
