// SPDX-License-Identifier: Apache-2.0
#include "runtime/event.h"

#include <optional>
#include <unordered_map>
#include <utility>

#include "runtime/device.h"
#include "runtime/error.h"

namespace ascend_emulator {

class Event::Mark {
 public:
  void Reach() {
    std::lock_guard lock(mutex_);
    if (!reached_at_) reached_at_ = std::chrono::steady_clock::now().time_since_epoch();
    changed_.notify_all();
  }

  void Wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return reached_at_.has_value(); });
  }

  std::optional<std::chrono::nanoseconds> ReachedAt() {
    std::lock_guard lock(mutex_);
    return reached_at_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<std::chrono::nanoseconds> reached_at_;
};

namespace {

// The live events of the process by handle. Never destroyed, for calls that come while the process exits.
struct Registry {
  static Registry& Get() {
    static Registry& registry = *new Registry;
    return registry;
  }

  std::mutex mutex;
  std::unordered_map<void*, std::unique_ptr<Event>> events;
};

Error NoSuchEvent() { return Error(Fault::kInvalidHandle, "the event handle is not that of a live event"); }

}  // namespace

Event& Event::Create(Timing timing) {
  std::unique_ptr<Event> event(new Event(timing));
  Event& result = *event;
  auto& registry = Registry::Get();
  std::lock_guard lock(registry.mutex);
  registry.events.emplace(result.handle(), std::move(event));
  return result;
}

Event& Event::From(void* handle) {
  auto& registry = Registry::Get();
  std::lock_guard lock(registry.mutex);
  const auto found = registry.events.find(handle);
  if (found == registry.events.end()) throw NoSuchEvent();
  return *found->second;
}

void Event::Destroy(void* handle) {
  auto& registry = Registry::Get();
  std::lock_guard lock(registry.mutex);
  if (registry.events.erase(handle) == 0) throw NoSuchEvent();
}

void Event::Record(Stream& stream) {
  // Reached also when its task is dropped, with a stream that broke or was abandoned: whoever waits goes on
  // and meets the error in that stream, instead of waiting for ever.
  struct ReachAtEnd {
    ~ReachAtEnd() { mark->Reach(); }
    std::shared_ptr<Mark> mark;
  };
  auto mark = std::make_shared<Mark>();
  auto reach_at_end = std::make_shared<ReachAtEnd>();
  reach_at_end->mark = mark;
  stream.Enqueue([reach_at_end] { reach_at_end->mark->Reach(); });
  std::lock_guard lock(mutex_);
  latest_ = std::move(mark);
}

void Event::Reset() {
  std::lock_guard lock(mutex_);
  latest_ = nullptr;
}

void Event::Wait(Stream& stream) const {
  if (auto mark = Latest()) stream.Enqueue([mark] { mark->Wait(); });
}

bool Event::Recorded() const { return Latest() != nullptr; }

bool Event::Reached() const {
  const auto mark = Latest();
  return mark && mark->ReachedAt();
}

void Event::Synchronize() const {
  Device::RefuseAfterFork();
  if (auto mark = Latest()) mark->Wait();
}

std::chrono::nanoseconds Event::ReachedAt() const {
  const auto mark = Latest();
  if (timing_ == Timing::kOff) {
    throw Error(Fault::kEventNotTimed, "the event keeps no time; create it with timing enabled");
  }
  if (!mark) throw Error(Fault::kEventNotTimed, "the event was never recorded, so it has no time");
  const auto reached_at = mark->ReachedAt();
  if (!reached_at) {
    throw Error(Fault::kEventNotComplete,
                "the event is not reached yet; synchronize it before asking for its time");
  }
  return *reached_at;
}

std::shared_ptr<Event::Mark> Event::Latest() const {
  std::lock_guard lock(mutex_);
  return latest_;
}

}  // namespace ascend_emulator
