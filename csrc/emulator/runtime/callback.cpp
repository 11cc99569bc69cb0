// SPDX-License-Identifier: Apache-2.0
#include "runtime/callback.h"

#include <pthread.h>

#include <condition_variable>
#include <deque>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "runtime/error.h"

namespace ascend_emulator {
namespace {

using Callback = std::function<void()>;

// The callbacks that wait for one thread.
class Inbox {
 public:
  void Put(Callback callback) {
    std::lock_guard lock(mutex_);
    callbacks_.push_back(std::move(callback));
    arrived_.notify_one();
  }

  std::optional<Callback> Take(std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    if (!arrived_.wait_for(lock, timeout, [this] { return !callbacks_.empty(); })) return std::nullopt;
    Callback callback = std::move(callbacks_.front());
    callbacks_.pop_front();
    return callback;
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Callback> callbacks_;
};

struct Subscriber {
  ThreadId thread;
  std::shared_ptr<Inbox> inbox;
};

// Who runs whose callbacks. Never destroyed, for calls that come while the process exits.
struct Subscriptions {
  static Subscriptions& Get() {
    static Subscriptions& subscriptions = *new Subscriptions;
    return subscriptions;
  }

  std::shared_ptr<Inbox> InboxOf(ThreadId thread) const {
    for (const auto& [stream, subscriber] : by_stream) {
      if (subscriber.thread == thread) return subscriber.inbox;
    }
    return nullptr;
  }

  std::mutex mutex;
  std::map<void*, Subscriber> by_stream;
};

}  // namespace

ThreadId ThisThread() { return static_cast<ThreadId>(pthread_self()); }

void SubscribeCallbacks(ThreadId thread, Stream& stream) {
  auto& subscriptions = Subscriptions::Get();
  std::lock_guard lock(subscriptions.mutex);
  auto inbox = subscriptions.InboxOf(thread);
  if (inbox == nullptr) inbox = std::make_shared<Inbox>();
  const bool added = subscriptions.by_stream.emplace(stream.handle(), Subscriber{thread, inbox}).second;
  if (!added)
    throw Error(Fault::kInvalidArgument, "a thread has already subscribed to the stream's callbacks");
}

void UnsubscribeCallbacks(ThreadId thread, Stream& stream) {
  auto& subscriptions = Subscriptions::Get();
  std::lock_guard lock(subscriptions.mutex);
  const auto found = subscriptions.by_stream.find(stream.handle());
  if (found == subscriptions.by_stream.end() || found->second.thread != thread) {
    throw Error(Fault::kNoSubscriber, "the thread has not subscribed to the stream's callbacks");
  }
  subscriptions.by_stream.erase(found);
}

void LaunchCallback(Stream& stream, Callback callback, AfterCallback after) {
  std::shared_ptr<Inbox> inbox;
  {
    auto& subscriptions = Subscriptions::Get();
    std::lock_guard lock(subscriptions.mutex);
    const auto found = subscriptions.by_stream.find(stream.handle());
    if (found == subscriptions.by_stream.end()) {
      throw Error(Fault::kNoSubscriber, "no thread has subscribed to the stream's callbacks");
    }
    inbox = found->second.inbox;
  }
  stream.Enqueue([inbox, callback = std::move(callback), after] {
    auto returned = std::make_shared<std::promise<void>>();
    auto wait = returned->get_future();
    inbox->Put([callback, returned] {
      callback();
      returned->set_value();
    });
    if (after == AfterCallback::kWait) wait.get();
  });
}

int RunCallbacks(std::chrono::milliseconds timeout) {
  std::shared_ptr<Inbox> inbox;
  {
    auto& subscriptions = Subscriptions::Get();
    std::lock_guard lock(subscriptions.mutex);
    inbox = subscriptions.InboxOf(ThisThread());
  }
  if (inbox == nullptr)
    throw Error(Fault::kNoSubscriber, "this thread has subscribed to no stream's callbacks");
  int count = 0;
  for (auto callback = inbox->Take(timeout); callback;
       callback = inbox->Take(std::chrono::milliseconds::zero())) {
    (*callback)();
    ++count;
  }
  return count;
}

}  // namespace ascend_emulator
