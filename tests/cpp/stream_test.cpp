// SPDX-License-Identifier: Apache-2.0
//
// Streams: order, idleness, failure, and their end.
#include "runtime/stream.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "gate.h"
#include "runtime/device.h"

using ascend_emulator::Device;
using ascend_emulator::Fault;
using ascend_emulator::Stream;
using std::chrono::milliseconds;

namespace {

void TasksRunInOrder() {
  Stream& stream = Stream::Create(0);
  std::vector<int> seen;
  for (int i = 0; i < 100; ++i) stream.Enqueue([&seen, i] { seen.push_back(i); });
  stream.Synchronize();
  Expect(seen.size() == 100, "100 tasks to have run");
  for (int i = 0; i < 100; ++i)
    Expect(seen[static_cast<std::size_t>(i)] == i, "task " + std::to_string(i) + " in its place");
  Stream::Destroy(stream.handle());
}

void EnqueueReturnsBeforeTheTaskRuns() {
  Stream& stream = Stream::Create(0);
  Gate gate;
  std::atomic<bool> ran{false};
  stream.Enqueue(gate.Task());
  stream.Enqueue([&] { ran = true; });
  Expect(!ran, "the task behind the gate not to have run");
  gate.Open();
  stream.Synchronize();
  Expect(ran, "the task behind the gate to have run");
  Stream::Destroy(stream.handle());
}

void AStreamIsBusyWhileItsLastTaskRuns() {
  Stream& stream = Stream::Create(0);
  Expect(stream.Idle(), "a new stream to be idle");
  Gate gate;
  std::promise<void> running;
  stream.Enqueue([&, wait = gate.Task()] {
    running.set_value();
    wait();
  });
  running.get_future().wait();
  Expect(!stream.Idle(), "the stream not to be idle while its only task runs");
  gate.Open();
  stream.Synchronize();
  Expect(stream.Idle(), "the stream to be idle after its task");
  Stream::Destroy(stream.handle());
}

void StreamsDoNotWaitForEachOther() {
  Stream& blocked = Stream::Create(0);
  Stream& free_stream = Stream::Create(0);
  Gate gate;
  blocked.Enqueue(gate.Task());
  bool ran = false;
  free_stream.Enqueue([&] { ran = true; });
  free_stream.Synchronize();
  Expect(ran && !blocked.Idle(), "the second stream to go on while the first is held");
  gate.Open();
  Stream::Destroy(blocked.handle());
  Stream::Destroy(free_stream.handle());
}

void WaitingEndsWhenTheTimeIsUp() {
  Stream& stream = Stream::Create(0);
  Gate gate;
  stream.Enqueue(gate.Task());
  Expect(!stream.SynchronizeFor(milliseconds(10)), "a held stream not to be done after 10 ms");
  gate.Open();
  Expect(stream.SynchronizeFor(milliseconds(30000)), "the stream to be done");
  Stream::Destroy(stream.handle());
}

void ATaskKnowsItsStreamsDevice() {
  Stream& stream = Stream::Create(1);
  int device = -1;
  stream.Enqueue([&] { device = Device::Current().index(); });
  stream.Synchronize();
  Expect(device == 1, "the current device in a task of a stream of device 1 to be 1");
  Stream::Destroy(stream.handle());
}

void AFailedTaskBreaksItsStream() {
  Stream& stream = Stream::Create(0);
  Gate gate;
  bool ran = false;
  stream.Enqueue([wait = gate.Task()] {
    wait();
    throw std::runtime_error("the matrix unit is on fire");
  });
  stream.Enqueue([&] { ran = true; });
  gate.Open();
  ExpectFault(Fault::kTaskFailed, "Synchronize to report the failure", [&] { stream.Synchronize(); });
  ExpectFault(Fault::kTaskFailed, "Idle to report the failure", [&] { stream.Idle(); });
  ExpectFault(Fault::kTaskFailed, "Enqueue to be refused", [&] { stream.Enqueue([] {}); });
  Expect(!ran, "the task behind the failed one not to have run");
  Stream::Destroy(stream.handle());
}

void DestroyRunsWhatIsQueued() {
  Stream& stream = Stream::Create(0);
  void* handle = stream.handle();
  std::atomic<int> count{0};
  for (int i = 0; i < 10; ++i) stream.Enqueue([&] { ++count; });
  Stream::Destroy(handle);
  Expect(count == 10, "all 10 tasks to have run");
  ExpectFault(Fault::kInvalidHandle, "the handle to be dead", [&] { Stream::From(handle); });
}

void AbandonDropsWhatIsQueued() {
  Stream& stream = Stream::Create(0);
  Gate gate;
  auto ran = std::make_shared<std::atomic<bool>>(false);
  auto ended = std::make_shared<std::promise<void>>();
  std::promise<void> running;
  stream.Enqueue([&running, ended, wait = gate.Task()] {
    running.set_value();
    wait();
    ended->set_value();
  });
  stream.Enqueue([ran] { *ran = true; });
  running.get_future().wait();
  Stream::Abandon(stream.handle());
  gate.Open();
  ended->get_future().wait();
  Expect(!*ran, "the queued task to be dropped");
}

void HandlesAreChecked() {
  int not_a_stream = 0;
  ExpectFault(Fault::kInvalidHandle, "a foreign pointer to be refused", [&] { Stream::From(&not_a_stream); });
  Device::SetCurrent(1);
  Expect(&Stream::From(nullptr) == &Device::At(1).DefaultStream(),
         "null to be the current device's default stream");
}

}  // namespace

int main() {
  return RunAll({
      {"tasks run in order", TasksRunInOrder},
      {"enqueue returns before the task runs", EnqueueReturnsBeforeTheTaskRuns},
      {"a stream is busy while its last task runs", AStreamIsBusyWhileItsLastTaskRuns},
      {"streams do not wait for each other", StreamsDoNotWaitForEachOther},
      {"waiting ends when the time is up", WaitingEndsWhenTheTimeIsUp},
      {"a task knows its stream's device", ATaskKnowsItsStreamsDevice},
      {"a failed task breaks its stream", AFailedTaskBreaksItsStream},
      {"destroy runs what is queued", DestroyRunsWhatIsQueued},
      {"abandon drops what is queued", AbandonDropsWhatIsQueued},
      {"handles are checked", HandlesAreChecked},
  });
}
