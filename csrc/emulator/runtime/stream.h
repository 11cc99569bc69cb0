// SPDX-License-Identifier: Apache-2.0
//
// A stream is a thread that runs tasks one after the other. Nothing else orders work, so that a
// synchronisation that is missing in a program shows here as it does on a card.
//
// A task that throws breaks its stream: later tasks are dropped, and every call that waits for the stream or
// adds to it throws that error. This is what a card does after an exception in a kernel.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace ascend_emulator {

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  using Task = std::function<void()>;

  // A new stream of `device`. Its thread starts with its first task.
  static Stream& Create(int device);

  // The stream behind a handle; null is the default stream of the current device.
  // Throws Error(kInvalidHandle) for anything that is not a live stream.
  static Stream& From(void* handle);

  // Every live stream of `device`.
  static std::vector<std::shared_ptr<Stream>> Of(int device);

  // Runs what is queued, then ends the stream.
  static void Destroy(void* handle);

  // Ends the stream after the task that is running, if any; drops the others.
  static void Abandon(void* handle);

  void* handle() { return this; }
  int device() const { return device_; }
  int id() const { return id_; }

  // Adds a task. The thread that runs it has the stream's device as its current device.
  void Enqueue(Task task);

  // True if the last task has returned, not merely left the queue.
  bool Idle() const;

  void Synchronize();

  // False if tasks are left when the time is up.
  bool SynchronizeFor(std::chrono::milliseconds timeout);

 private:
  Stream(int device, int id) : device_(device), id_(id) {}

  void AwaitIdle();
  void Run();
  void RunOne(const Task& task);
  void End();
  void ThrowIfBroken() const;
  bool IdleLocked() const { return tasks_.empty() && !running_; }

  const int device_;
  const int id_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool started_ = false;
  bool running_ = false;
  bool ended_ = false;
  std::optional<std::string> failure_;
};

}  // namespace ascend_emulator
