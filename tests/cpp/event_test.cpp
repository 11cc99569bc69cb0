// SPDX-License-Identifier: Apache-2.0
//
// Events: what they hold back, and when they were reached.
#include "runtime/event.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "gate.h"
#include "runtime/device.h"

using ascend_emulator::Event;
using ascend_emulator::Fault;
using ascend_emulator::Stream;

namespace {

// Long enough for a stream that nothing holds back to be done.
constexpr std::chrono::milliseconds kGrace(50);

struct TwoStreams {
  Stream& first = Stream::Create(0);
  Stream& second = Stream::Create(0);
  ~TwoStreams() {
    Stream::Abandon(first.handle());
    Stream::Abandon(second.handle());
  }
};

void AWaitOrdersTwoStreams() {
  TwoStreams streams;
  Gate gate;
  Event& event = Event::Create(Event::Timing::kOff);
  int value = 0;
  int seen = -1;
  streams.first.Enqueue(gate.Task());
  streams.first.Enqueue([&] { value = 7; });
  event.Record(streams.first);
  event.Wait(streams.second);
  streams.second.Enqueue([&] { seen = value; });
  Expect(!event.Reached(), "the event not to be reached behind the gate");
  Expect(!streams.second.SynchronizeFor(kGrace), "the second stream to be held back");
  gate.Open();
  streams.second.Synchronize();
  Expect(seen == 7, "the second stream to see what the first wrote before the event");
  Event::Destroy(event.handle());
}

void AWaitIsForTheLatestRecordAtThatTime() {
  TwoStreams streams;
  Gate first_gate;
  Gate second_gate;
  Event& event = Event::Create(Event::Timing::kOff);
  streams.first.Enqueue(first_gate.Task());
  event.Record(streams.first);
  event.Wait(streams.second);
  Expect(!streams.second.SynchronizeFor(kGrace), "the second stream to wait for the first record");
  streams.first.Enqueue(second_gate.Task());
  event.Record(streams.first);
  first_gate.Open();
  streams.second.Synchronize();
  Expect(!event.Reached(), "the event itself to stand for its second record");
  second_gate.Open();
  event.Synchronize();
  Expect(event.Reached(), "the event to be reached");
  Event::Destroy(event.handle());
}

void AnEventNeverRecordedHoldsNothingBack() {
  TwoStreams streams;
  Event& event = Event::Create(Event::Timing::kOff);
  event.Wait(streams.first);
  streams.first.Synchronize();
  event.Synchronize();
  Expect(!event.Recorded() && !event.Reached(), "the event to be neither recorded nor reached");
  Event::Destroy(event.handle());
}

void ADestroyedEventStillHoldsBackWhoWaits() {
  TwoStreams streams;
  Gate gate;
  Event& event = Event::Create(Event::Timing::kOff);
  std::atomic<bool> ran{false};
  streams.first.Enqueue(gate.Task());
  event.Record(streams.first);
  event.Wait(streams.second);
  streams.second.Enqueue([&] { ran = true; });
  void* handle = event.handle();
  Event::Destroy(handle);
  ExpectFault(Fault::kInvalidHandle, "the handle to be dead", [&] { Event::From(handle); });
  Expect(!streams.second.SynchronizeFor(kGrace) && !ran, "the second stream still to be held back");
  gate.Open();
  streams.second.Synchronize();
  Expect(ran, "the second stream to go on after the gate opened");
}

void AnAbandonedStreamLetsGoOfWhoWaits() {
  TwoStreams streams;
  Gate gate;
  Stream& abandoned = Stream::Create(0);
  Event& event = Event::Create(Event::Timing::kOff);
  abandoned.Enqueue(gate.Task());
  event.Record(abandoned);
  event.Wait(streams.second);
  Stream::Abandon(abandoned.handle());
  streams.second.Synchronize();
  Event::Destroy(event.handle());
}

void TimesAreThoseOfTheRecords() {
  TwoStreams streams;
  Event& start = Event::Create(Event::Timing::kOn);
  Event& end = Event::Create(Event::Timing::kOn);
  start.Record(streams.first);
  streams.first.Enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); });
  end.Record(streams.first);
  end.Synchronize();
  Expect(end.ReachedAt() - start.ReachedAt() >= std::chrono::milliseconds(20),
         "at least 20 ms between the events");
  Event::Destroy(start.handle());
  Event::Destroy(end.handle());
}

void ATimeThatIsNotThereIsRefused() {
  TwoStreams streams;
  Gate gate;
  Event& untimed = Event::Create(Event::Timing::kOff);
  Event& timed = Event::Create(Event::Timing::kOn);
  ExpectFault(Fault::kEventNotTimed, "no time before the first record", [&] { timed.ReachedAt(); });
  untimed.Record(streams.first);
  untimed.Synchronize();
  ExpectFault(Fault::kEventNotTimed, "no time without timing", [&] { untimed.ReachedAt(); });
  streams.first.Enqueue(gate.Task());
  timed.Record(streams.first);
  ExpectFault(Fault::kEventNotComplete, "no time before the event is reached", [&] { timed.ReachedAt(); });
  gate.Open();
  streams.first.Synchronize();
  Event::Destroy(untimed.handle());
  Event::Destroy(timed.handle());
}

}  // namespace

int main() {
  return RunAll({
      {"a wait orders two streams", AWaitOrdersTwoStreams},
      {"a wait is for the latest record at that time", AWaitIsForTheLatestRecordAtThatTime},
      {"an event never recorded holds nothing back", AnEventNeverRecordedHoldsNothingBack},
      {"a destroyed event still holds back who waits", ADestroyedEventStillHoldsBackWhoWaits},
      {"an abandoned stream lets go of who waits", AnAbandonedStreamLetsGoOfWhoWaits},
      {"times are those of the records", TimesAreThoseOfTheRecords},
      {"a time that is not there is refused", ATimeThatIsNotThereIsRefused},
  });
}
