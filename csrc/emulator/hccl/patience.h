// SPDX-License-Identifier: Apache-2.0
//
// Waiting for another process that shares the processor with us.
#pragma once

#include <chrono>
#include <optional>

namespace ascend_emulator::hccl {

/// Waits in ever longer steps: first yields, so that a peer that is about to answer is met within
/// microseconds, then sleeps up to half a millisecond, so that many waiting ranks leave two cores to the ones
/// that compute.
class Patience {
 public:
  /// `limit`: how long to wait without progress; none means for ever.
  explicit Patience(std::optional<std::chrono::seconds> limit);

  /// One step of waiting.
  void Pause();

  /// Something happened: waiting starts anew.
  void Reset();

  /// True at most once every few milliseconds: time to look whether the peers still live.
  bool TimeToLook();

  /// Has nothing happened for longer than the limit?
  bool Exhausted() const;

 private:
  using Clock = std::chrono::steady_clock;

  std::optional<std::chrono::seconds> limit_;
  int steps_ = 0;
  Clock::time_point since_;
  Clock::time_point next_look_;
};

}  // namespace ascend_emulator::hccl
