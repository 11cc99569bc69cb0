// SPDX-License-Identifier: Apache-2.0
#include "runtime/event.h"

#include <acl/acl.h>

#include <chrono>
#include <string>

#include "acl/error.h"
#include "runtime/device.h"

namespace {

using ascend_emulator::Device;
using ascend_emulator::Event;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::RequireNonNull;
using ascend_emulator::Stream;

// Events across processes and events that a captured graph waits for are not emulated.
constexpr uint32_t kHonouredFlags =
    ACL_EVENT_SYNC | ACL_EVENT_CAPTURE_STREAM_PROGRESS | ACL_EVENT_TIME_LINE | ACL_EVENT_DEVICE_USE_ONLY;

aclError CreateEvent(const char* call, aclrtEvent* event, uint32_t flag) {
  if ((flag & ~kHonouredFlags) != 0) {
    return Report(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, std::string(call) + " with flag " + std::to_string(flag) +
                                                        " is not emulated; see docs/emulator.md");
  }
  return Guarded([&] {
    RequireNonNull(call, event);
    Device::Current();
    const bool timed = (flag & ACL_EVENT_TIME_LINE) != 0;
    *event = Event::Create(timed ? Event::Timing::kOn : Event::Timing::kOff).handle();
  });
}

}  // namespace

extern "C" {

aclError aclrtCreateEvent(aclrtEvent* event) {
  return CreateEvent("aclrtCreateEvent", event, ACL_EVENT_TIME_LINE);
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  return CreateEvent("aclrtCreateEventWithFlag", event, flag);
}

// Events across processes and for captured graphs are refused, here and above.
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) {
  return CreateEvent("aclrtCreateEventExWithFlag", event, flag);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  return Guarded([&] { Event::Destroy(event); });
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  return Guarded([&] { Event::From(event).Record(Stream::From(stream)); });
}

// At once: what already waits for the event is bound to its record.
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
  return Guarded([&] {
    Stream::From(stream);
    Event::From(event).Reset();
  });
}

// Binds to the latest record; an event that was never recorded holds nothing back.
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  return Guarded([&] { Event::From(event).Wait(Stream::From(stream)); });
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  return Guarded([&] {
    RequireNonNull("aclrtQueryEventStatus", status);
    *status = Event::From(event).Reached() ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                           : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  return Guarded([&] { Event::From(event).Synchronize(); });
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  return Guarded([&] {
    RequireNonNull("aclrtEventElapsedTime", milliseconds);
    const auto elapsed = Event::From(end).ReachedAt() - Event::From(start).ReachedAt();
    *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  });
}

// In microseconds, as on a card; the start is arbitrary.
aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* timestamp) {
  return Guarded([&] {
    RequireNonNull("aclrtEventGetTimestamp", timestamp);
    const auto at = std::chrono::duration_cast<std::chrono::microseconds>(Event::From(event).ReachedAt());
    *timestamp = static_cast<uint64_t>(at.count());
  });
}

}  // extern "C"
