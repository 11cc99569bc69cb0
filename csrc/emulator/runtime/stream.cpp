// SPDX-License-Identifier: Apache-2.0
#include "runtime/stream.h"

#include <thread>
#include <unordered_map>
#include <utility>

#include "runtime/device.h"
#include "runtime/error.h"

namespace ascend_emulator {
namespace {

// The live streams of the process by handle.
class Registry {
 public:
  // Never destroyed: torch_npu's threads still call while the process exits.
  static Registry& Get() {
    static Registry& registry = *new Registry;
    return registry;
  }

  int NextId() {
    std::lock_guard lock(mutex_);
    return next_id_++;
  }

  void Add(std::shared_ptr<Stream> stream) {
    std::lock_guard lock(mutex_);
    void* const handle = stream->handle();
    streams_.emplace(handle, std::move(stream));
  }

  Stream& Find(void* handle) const {
    std::lock_guard lock(mutex_);
    const auto found = streams_.find(handle);
    if (found == streams_.end()) throw NoSuchStream();
    return *found->second;
  }

  std::shared_ptr<Stream> Take(void* handle) {
    std::lock_guard lock(mutex_);
    const auto found = streams_.find(handle);
    if (found == streams_.end()) throw NoSuchStream();
    auto stream = std::move(found->second);
    streams_.erase(found);
    return stream;
  }

  std::vector<std::shared_ptr<Stream>> Of(int device) const {
    std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<Stream>> result;
    for (const auto& [handle, stream] : streams_) {
      if (stream->device() == device) result.push_back(stream);
    }
    return result;
  }

 private:
  static Error NoSuchStream() {
    return Error(Fault::kInvalidHandle, "the stream handle is not that of a live stream");
  }

  mutable std::mutex mutex_;
  std::unordered_map<void*, std::shared_ptr<Stream>> streams_;
  int next_id_ = 0;
};

}  // namespace

Stream& Stream::Create(int device) {
  std::shared_ptr<Stream> stream(new Stream(device, Registry::Get().NextId()));
  Registry::Get().Add(stream);
  return *stream;
}

Stream& Stream::From(void* handle) {
  return handle == nullptr ? Device::Current().DefaultStream() : Registry::Get().Find(handle);
}

std::vector<std::shared_ptr<Stream>> Stream::Of(int device) { return Registry::Get().Of(device); }

void Stream::Destroy(void* handle) {
  Device::RefuseAfterFork();
  const auto stream = Registry::Get().Take(handle);
  stream->AwaitIdle();
  stream->End();
}

void Stream::Abandon(void* handle) { Registry::Get().Take(handle)->End(); }

void Stream::Enqueue(Task task) {
  Device::RefuseAfterFork();
  std::lock_guard lock(mutex_);
  ThrowIfBroken();
  if (ended_) throw Error(Fault::kInvalidHandle, "the stream was destroyed while work was added to it");
  tasks_.push_back(std::move(task));
  if (!started_) {
    started_ = true;
    // Detached, because a stream may be abandoned in the middle of a task that waits for another process. The
    // thread ends with the stream: it keeps the object alive, and End() tells it to stop.
    std::thread([self = shared_from_this()] { self->Run(); }).detach();
  }
  changed_.notify_all();
}

bool Stream::Idle() const {
  std::lock_guard lock(mutex_);
  ThrowIfBroken();
  return IdleLocked();
}

void Stream::Synchronize() {
  Device::RefuseAfterFork();
  AwaitIdle();
  std::lock_guard lock(mutex_);
  ThrowIfBroken();
}

bool Stream::SynchronizeFor(std::chrono::milliseconds timeout) {
  Device::RefuseAfterFork();
  std::unique_lock lock(mutex_);
  const bool idle = changed_.wait_for(lock, timeout, [this] { return IdleLocked(); });
  ThrowIfBroken();
  return idle;
}

void Stream::AwaitIdle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return IdleLocked(); });
}

void Stream::Run() {
  Device::SetCurrent(device_);
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ended_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    running_ = true;
    {
      const Task task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      RunOne(task);
    }
    lock.lock();
    running_ = false;
    changed_.notify_all();
  }
}

void Stream::RunOne(const Task& task) {
  std::deque<Task> dropped;
  try {
    task();
  } catch (const std::exception& error) {
    std::lock_guard lock(mutex_);
    failure_ = error.what();
    dropped.swap(tasks_);
  }
}

void Stream::End() {
  std::deque<Task> dropped;
  std::lock_guard lock(mutex_);
  ended_ = true;
  dropped.swap(tasks_);
  changed_.notify_all();
}

void Stream::ThrowIfBroken() const {
  if (failure_) throw Error(Fault::kTaskFailed, "a task on the stream failed: " + *failure_);
}

}  // namespace ascend_emulator
