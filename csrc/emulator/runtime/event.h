// SPDX-License-Identifier: Apache-2.0
//
// An event marks a place in a stream. Recording it again moves the mark; a stream that already waits keeps
// waiting for the mark that was the latest when it was told to.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "runtime/stream.h"

namespace ascend_emulator {

class Event {
 public:
  enum class Timing { kOff, kOn };

  static Event& Create(Timing timing);

  // Throws Error(kInvalidHandle) for anything that is not a live event.
  static Event& From(void* handle);

  // Ends the event. Streams that wait for its mark keep waiting for it.
  static void Destroy(void* handle);

  void* handle() { return this; }

  void Record(Stream& stream);

  // Back to the state before the first Record. What already waits is not affected.
  void Reset();

  // Holds `stream` back until the latest mark is reached. An event that was never recorded holds nothing
  // back.
  void Wait(Stream& stream) const;

  bool Recorded() const;

  // True if the latest mark is reached; false also before the first Record.
  bool Reached() const;

  // Blocks the calling thread until the latest mark is reached.
  void Synchronize() const;

  // When the latest mark was reached, since an arbitrary start. Throws Error(kEventNotTimed) if the event was
  // created with Timing::kOff or never recorded, Error(kEventNotComplete) if the mark is not reached.
  std::chrono::nanoseconds ReachedAt() const;

 private:
  class Mark;

  explicit Event(Timing timing) : timing_(timing) {}
  std::shared_ptr<Mark> Latest() const;

  const Timing timing_;
  mutable std::mutex mutex_;
  std::shared_ptr<Mark> latest_;
};

}  // namespace ascend_emulator
