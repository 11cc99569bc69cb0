// SPDX-License-Identifier: Apache-2.0
//
// Functions that a stream hands to a thread of the program. The thread subscribes to streams and then asks,
// again and again, for what they have for it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>

#include "runtime/stream.h"

namespace ascend_emulator {

using ThreadId = std::uint64_t;

// The id of the calling thread, as pthread_self gives it.
ThreadId ThisThread();

// From now on `thread` runs the callbacks of `stream`. Throws Error(kInvalidArgument) if another one does.
void SubscribeCallbacks(ThreadId thread, Stream& stream);
void UnsubscribeCallbacks(ThreadId thread, Stream& stream);

enum class AfterCallback { kGoOn, kWait };

// Adds to `stream` that `callback` be handed to its subscriber; with kWait, later tasks of the stream start
// after it has returned. Throws Error(kNoSubscriber) if no thread subscribed to `stream`.
void LaunchCallback(Stream& stream, std::function<void()> callback, AfterCallback after);

// Runs callbacks of the calling thread until none is left, waiting up to `timeout` for the first.
// Returns how many ran. Throws Error(kNoSubscriber) if the thread has subscribed to nothing.
int RunCallbacks(std::chrono::milliseconds timeout);

}  // namespace ascend_emulator
