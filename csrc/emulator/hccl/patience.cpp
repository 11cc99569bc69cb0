// SPDX-License-Identifier: Apache-2.0
//
// The steps of waiting; see patience.h.
#include "hccl/patience.h"

#include <algorithm>
#include <thread>

namespace ascend_emulator::hccl {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr int kYields = 200;
constexpr microseconds kFirstSleep{20};
constexpr microseconds kLongestSleep{500};
constexpr milliseconds kBetweenLooks{20};

}  // namespace

Patience::Patience(std::optional<std::chrono::seconds> limit) : limit_(limit) { Reset(); }

void Patience::Pause() {
  ++steps_;
  if (steps_ <= kYields) {
    std::this_thread::yield();
    return;
  }
  const int doublings = std::min(steps_ - kYields - 1, 5);
  std::this_thread::sleep_for(std::min(kFirstSleep * (1 << doublings), kLongestSleep));
}

void Patience::Reset() {
  steps_ = 0;
  since_ = Clock::now();
  next_look_ = since_ + kBetweenLooks;
}

bool Patience::TimeToLook() {
  // Reading the clock at every yield would cost as much as the yield.
  if (steps_ < kYields) return false;
  const Clock::time_point now = Clock::now();
  if (now < next_look_) return false;
  next_look_ = now + kBetweenLooks;
  return true;
}

bool Patience::Exhausted() const { return limit_ && Clock::now() - since_ > *limit_; }

}  // namespace ascend_emulator::hccl
