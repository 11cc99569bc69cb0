// SPDX-License-Identifier: Apache-2.0
//
// Callbacks: they run on the thread that subscribed, and hold the stream back if they are told to.
#include "runtime/callback.h"

#include <atomic>
#include <chrono>

#include "check.h"
#include "runtime/device.h"

using ascend_emulator::AfterCallback;
using ascend_emulator::Fault;
using ascend_emulator::Stream;
using ascend_emulator::ThisThread;
using std::chrono::milliseconds;

namespace {

constexpr milliseconds kLong(30000);

void ACallbackRunsOnItsSubscriberAndHoldsTheStream() {
  Stream& stream = Stream::Create(0);
  ascend_emulator::SubscribeCallbacks(ThisThread(), stream);
  std::uint64_t ran_on = 0;
  std::atomic<bool> later{false};
  ascend_emulator::LaunchCallback(stream, [&] { ran_on = ThisThread(); }, AfterCallback::kWait);
  stream.Enqueue([&] { later = true; });
  Expect(!stream.SynchronizeFor(milliseconds(20)) && !later, "the stream to wait for the callback");
  Expect(ascend_emulator::RunCallbacks(kLong) == 1, "one callback to run");
  stream.Synchronize();
  Expect(ran_on == ThisThread() && later, "the callback to run here, and then the stream to go on");
  ascend_emulator::UnsubscribeCallbacks(ThisThread(), stream);
  Stream::Destroy(stream.handle());
}

void AStreamNeedNotWait() {
  Stream& stream = Stream::Create(0);
  ascend_emulator::SubscribeCallbacks(ThisThread(), stream);
  bool ran = false;
  ascend_emulator::LaunchCallback(stream, [&] { ran = true; }, AfterCallback::kGoOn);
  stream.Synchronize();
  Expect(!ran, "the callback to wait for its thread");
  Expect(ascend_emulator::RunCallbacks(kLong) == 1 && ran, "the callback to run when its thread asks");
  Expect(ascend_emulator::RunCallbacks(milliseconds(1)) == 0, "no callback to be left");
  ascend_emulator::UnsubscribeCallbacks(ThisThread(), stream);
  Stream::Destroy(stream.handle());
}

void WithoutASubscriberACallbackIsRefused() {
  Stream& stream = Stream::Create(0);
  ExpectFault(Fault::kNoSubscriber, "the launch to be refused",
              [&] { ascend_emulator::LaunchCallback(stream, [] {}, AfterCallback::kGoOn); });
  ExpectFault(Fault::kNoSubscriber, "asking for callbacks to be refused",
              [] { ascend_emulator::RunCallbacks(milliseconds(0)); });
  Stream::Destroy(stream.handle());
}

}  // namespace

int main() {
  return RunAll({
      {"a callback runs on its subscriber and holds the stream",
       ACallbackRunsOnItsSubscriberAndHoldsTheStream},
      {"a stream need not wait", AStreamNeedNotWait},
      {"without a subscriber a callback is refused", WithoutASubscriberACallbackIsRefused},
  });
}
