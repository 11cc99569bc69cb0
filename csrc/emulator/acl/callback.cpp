// SPDX-License-Identifier: Apache-2.0
#include "runtime/callback.h"

#include <acl/acl.h>

#include <chrono>

#include "acl/error.h"

using ascend_emulator::AfterCallback;
using ascend_emulator::Error;
using ascend_emulator::Fault;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::Stream;

extern "C" {

aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream) {
  return Guarded([&] { ascend_emulator::SubscribeCallbacks(thread, Stream::From(stream)); });
}

aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream) {
  return Guarded([&] { ascend_emulator::UnsubscribeCallbacks(thread, Stream::From(stream)); });
}

aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType block,
                             aclrtStream stream) {
  return Guarded([&] {
    if (function == nullptr)
      throw Error(Fault::kInvalidArgument, "aclrtLaunchCallback was given no function");
    const auto after = block == ACL_CALLBACK_BLOCK ? AfterCallback::kWait : AfterCallback::kGoOn;
    ascend_emulator::LaunchCallback(Stream::From(stream), [=] { function(argument); }, after);
  });
}

// `timeout` is in milliseconds; -1 waits for ever.
aclError aclrtProcessReport(int32_t timeout) {
  constexpr auto kForEver = std::chrono::hours(24 * 365);
  int count = 0;
  const aclError code = Guarded([&] {
    count = ascend_emulator::RunCallbacks(timeout == -1 ? kForEver : std::chrono::milliseconds(timeout));
  });
  if (code != ACL_SUCCESS || count > 0) return code;
  return Report(ACL_ERROR_RT_REPORT_TIMEOUT, "no callback came in " + std::to_string(timeout) + " ms");
}

// Runs `function` on the stream's own thread.
aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  return Guarded([&] {
    if (function == nullptr)
      throw Error(Fault::kInvalidArgument, "aclrtLaunchHostFunc was given no function");
    Stream::From(stream).Enqueue([=] { function(argument); });
  });
}

}  // extern "C"
