// SPDX-License-Identifier: Apache-2.0
//
// The memory that the ranks of one communicator share, and how they find it.
//
// The founder makes an anonymous file in memory (memfd) and hands out an Invitation: its process, the file's
// number there and a random token. The others open it as /proc/PID/fd/NUMBER. It never has a name in the file
// system, so nothing is left behind however a process ends, and when all ranks have mapped it every
// descriptor is closed.
//
//   [Directory: who is here, in what state][ring 0->0][ring 0->1] ... [ring n-1->n-1]
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "hccl/process.h"
#include "hccl/ring.h"

namespace ascend_emulator::hccl {

/// What the founder sends to the other ranks, as plain bytes, by whatever way they have.
struct Invitation {
  uint64_t magic;
  ProcessIdentity founder;
  int32_t descriptor;
  std::array<uint64_t, 2> token;
  std::array<char, 65> host;

  /// Makes the shared file in this process. Throws Error(HCCL_E_SYSCALL).
  static Invitation Found();
};

enum class RankState : uint32_t {
  kAbsent = 0,  // zero, because that is what fresh shared memory holds
  kArriving,
  kPresent,
  kFailed,
  kLeft,
};

/// One rank as the others see it.
struct RankEntry {
  alignas(64) std::atomic<RankState> state;
  std::atomic<pid_t> pid;
  std::atomic<uint64_t> start_ticks;

  ProcessIdentity process() const { return {pid.load(), start_ticks.load()}; }
};

struct JoinRequest {
  uint32_t rank;
  uint32_t num_ranks;
  /// What all rings together may take; the first rank to arrive decides for all.
  size_t buffer_bytes;
  std::chrono::seconds timeout;
};

/// One rank's mapping of the shared memory.
class Segment {
 public:
  static constexpr uint32_t kMaxRanks = 64;

  /// Joins as request.rank and returns when all ranks have joined. Throws Error: HCCL_E_PARA for an
  /// invitation, size or rank that does not fit what the others said; HCCL_E_TIMEOUT naming a rank that
  /// did not come in time; HCCL_E_REMOTE for a rank that ended meanwhile.
  static std::unique_ptr<Segment> Join(const Invitation& invitation, const JoinRequest& request);

  /// Tells the others that this rank has left, unless it told them that it failed.
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  RankEntry& entry(uint32_t rank) const;
  Ring ring(uint32_t from, uint32_t to) const;

  /// Bytes of each ring.
  size_t ring_bytes() const { return ring_bytes_; }

 private:
  struct Directory;

  explicit Segment(const JoinRequest& request);
  static size_t DirectoryBytes();
  friend struct Invitation;

  Directory& directory() const;
  void Map(int descriptor, size_t bytes);
  void AgreeOnShape(int descriptor, size_t buffer_bytes);
  void Claim();
  void AwaitAll(std::chrono::seconds timeout);
  std::vector<uint32_t> Missing() const;
  void ThrowIfSomeoneEnded() const;

  uint32_t rank_;
  uint32_t num_ranks_;
  size_t ring_bytes_ = 0;
  std::byte* base_ = nullptr;
  size_t mapped_bytes_ = 0;
  bool claimed_ = false;
  bool joined_ = false;
};

}  // namespace ascend_emulator::hccl
