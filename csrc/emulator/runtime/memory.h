// SPDX-License-Identifier: Apache-2.0
//
// Memory of one device: host memory with a budget. Fresh memory holds 0xFF in every byte, which reads as NaN
// in every floating-point type that KV caches use, so that a value nobody wrote shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace ascend_emulator {

class Memory {
 public:
  explicit Memory(std::size_t budget_bytes) : budget_bytes_(budget_bytes) {}
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Returns page-aligned memory. Sizes count in whole pages. Throws Error(kOutOfMemory) past the budget or
  // when the host itself has none left, Error(kInvalidArgument) for 0 bytes.
  void* Allocate(std::size_t bytes);

  // Gives `start` back to the host: a later access ends the process, as a wild pointer should.
  // Throws Error(kNotAllocated) unless `start` is what Allocate returned.
  void Free(void* start);

  // True if all of [start, start + bytes) lies in one allocation of this device.
  bool Contains(const void* start, std::size_t bytes) const;

  std::size_t TotalBytes() const { return budget_bytes_; }
  std::size_t FreeBytes() const;

 private:
  const std::size_t budget_bytes_;
  mutable std::mutex mutex_;
  std::size_t used_bytes_ = 0;
  // Start and size in bytes of each allocation.
  std::map<std::uintptr_t, std::size_t> allocations_;
};

// Host memory that the program pinned. Every page of the host is as good to the emulator; what it keeps is
// which addresses are pinned, because programs ask.
class PinnedMemory {
 public:
  static PinnedMemory& Get();

  // Returns page-aligned memory. Throws Error(kOutOfMemory), Error(kInvalidArgument) for 0 bytes.
  void* Allocate(std::size_t bytes);

  // Throws Error(kNotAllocated) unless `start` is what Allocate returned.
  void Free(void* start);

  bool Contains(const void* address) const;

 private:
  PinnedMemory() = default;

  mutable std::mutex mutex_;
  std::map<std::uintptr_t, std::size_t> allocations_;
};

}  // namespace ascend_emulator
