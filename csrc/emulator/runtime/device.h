// SPDX-License-Identifier: Apache-2.0
//
// The devices this process sees, and which of them a thread works on. A process that forks after it used a
// device loses its streams' threads, as it loses its connection to a card: the child may count devices and
// nothing else.
#pragma once

#include <memory>
#include <mutex>

#include "runtime/memory.h"
#include "runtime/stream.h"

namespace ascend_emulator {

class Device {
 public:
  static int Count();

  // Throws Error(kInvalidDevice) unless 0 <= index < Count().
  static Device& At(int index);

  // The device of the calling thread. Throws Error(kNoCurrentDevice) before SetCurrent.
  static Device& Current();
  static bool HasCurrent();

  // Each thread has its own. Throws Error(kInvalidDevice), Error(kForkedProcess).
  static void SetCurrent(int index);
  static void ClearCurrent();

  // The device in whose memory all of [start, start + bytes) lies, or null.
  static Device* Owning(const void* start, std::size_t bytes);

  // Throws Error(kForkedProcess) in the child of a process that had used a device.
  static void RefuseAfterFork();

  int index() const { return index_; }
  int physical_index() const { return physical_index_; }
  Memory& memory() { return memory_; }
  Stream& DefaultStream();

  // Waits for every stream of the device; throws the first broken stream's error.
  void Synchronize();

  // False if a stream still has tasks when the time is up.
  bool SynchronizeFor(std::chrono::milliseconds timeout);

 private:
  friend class Machine;
  Device(int index, int physical_index, std::size_t memory_bytes)
      : index_(index), physical_index_(physical_index), memory_(memory_bytes) {}

  const int index_;
  const int physical_index_;
  Memory memory_;
  std::once_flag default_stream_once_;
  Stream* default_stream_ = nullptr;
};

}  // namespace ascend_emulator
