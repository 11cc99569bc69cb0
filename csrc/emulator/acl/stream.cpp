// SPDX-License-Identifier: Apache-2.0
#include "runtime/stream.h"

#include <acl/acl.h>

#include <chrono>
#include <string>

#include "acl/error.h"
#include "runtime/device.h"

using ascend_emulator::Device;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::RequireNonNull;
using ascend_emulator::Stream;

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  return Guarded([&] {
    RequireNonNull("aclrtCreateStream", stream);
    *stream = Stream::Create(Device::Current().index()).handle();
  });
}

// Streams of the emulator have equal priority, which is what CANN gives for the priorities torch_npu asks
// for. The fast-launch and fast-sync flags change speed alone.
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t flag) {
  constexpr uint32_t kHonoured = ACL_STREAM_FAST_LAUNCH | ACL_STREAM_FAST_SYNC;
  if ((flag & ~kHonoured) != 0) {
    return Report(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtCreateStreamWithConfig with flag " +
                                                        std::to_string(flag) +
                                                        " is not emulated; see docs/emulator.md");
  }
  return aclrtCreateStream(stream);
}

// Waits for the work of the stream first.
aclError aclrtDestroyStream(aclrtStream stream) {
  return Guarded([&] {
    RequireNonNull("aclrtDestroyStream", stream);
    Stream::Destroy(stream);
  });
}

// Drops what has not begun; what runs, ends.
aclError aclrtDestroyStreamForce(aclrtStream stream) {
  return Guarded([&] {
    RequireNonNull("aclrtDestroyStreamForce", stream);
    Stream::Abandon(stream);
  });
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  return Guarded([&] {
    RequireNonNull("aclrtStreamQuery", status);
    *status = Stream::From(stream).Idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  });
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  return Guarded([&] { Stream::From(stream).Synchronize(); });
}

// `timeout` is in milliseconds; -1 waits for ever.
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
  if (timeout == -1) return aclrtSynchronizeStream(stream);
  bool idle = false;
  const aclError code =
      Guarded([&] { idle = Stream::From(stream).SynchronizeFor(std::chrono::milliseconds(timeout)); });
  if (code != ACL_SUCCESS || idle) return code;
  return Report(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
                "the stream still has work after " + std::to_string(timeout) + " ms");
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  return Guarded([&] {
    RequireNonNull("aclrtStreamGetId", id);
    *id = Stream::From(stream).id();
  });
}

}  // extern "C"
