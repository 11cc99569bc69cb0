// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "runtime/error.h"

namespace ascend_emulator {
namespace {

constexpr int kNaNByte = 0xFF;

std::size_t RoundUpToPages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// True if all of [start, start + bytes) lies in one of `allocations`, which map a start to a size in bytes.
bool InOneOf(const std::map<std::uintptr_t, std::size_t>& allocations, const void* start, std::size_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(start);
  auto after = allocations.upper_bound(first);
  if (after == allocations.begin()) return false;
  const auto& [base, size] = *--after;
  return first - base < size && bytes <= size - (first - base);
}

}  // namespace

Memory::~Memory() {
  for (const auto& [start, bytes] : allocations_) munmap(reinterpret_cast<void*>(start), bytes);
}

void* Memory::Allocate(std::size_t bytes) {
  if (bytes == 0)
    throw Error(Fault::kInvalidArgument, "0 bytes of device memory were asked for; ask for at least 1");
  void* start = nullptr;
  {
    std::lock_guard lock(mutex_);
    const std::size_t free_bytes = budget_bytes_ - used_bytes_;
    if (bytes > free_bytes || RoundUpToPages(bytes) > free_bytes) {
      throw Error(Fault::kOutOfMemory, std::to_string(bytes) + " bytes of device memory were asked for and " +
                                           std::to_string(free_bytes) + " of " +
                                           std::to_string(budget_bytes_) +
                                           " are free; free some, or raise ASCEND_EMULATOR_MEMORY");
    }
    bytes = RoundUpToPages(bytes);
    start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
      throw Error(Fault::kOutOfMemory, "the host has no " + std::to_string(bytes) +
                                           " bytes left for device memory; lower ASCEND_EMULATOR_MEMORY");
    }
    used_bytes_ += bytes;
    allocations_.emplace(reinterpret_cast<std::uintptr_t>(start), bytes);
  }
  // Outside the lock: filling gigabytes takes seconds, and nobody else knows this memory yet.
  std::memset(start, kNaNByte, bytes);
  return start;
}

void Memory::Free(void* start) {
  std::lock_guard lock(mutex_);
  const auto found = allocations_.find(reinterpret_cast<std::uintptr_t>(start));
  if (found == allocations_.end()) {
    throw Error(Fault::kNotAllocated, "the address to free is not the start of an allocation of this device");
  }
  munmap(start, found->second);
  used_bytes_ -= found->second;
  allocations_.erase(found);
}

bool Memory::Contains(const void* start, std::size_t bytes) const {
  std::lock_guard lock(mutex_);
  return InOneOf(allocations_, start, bytes);
}

std::size_t Memory::FreeBytes() const {
  std::lock_guard lock(mutex_);
  return budget_bytes_ - used_bytes_;
}

// Never destroyed, for calls that come while the process exits.
PinnedMemory& PinnedMemory::Get() {
  static PinnedMemory& memory = *new PinnedMemory;
  return memory;
}

void* PinnedMemory::Allocate(std::size_t bytes) {
  if (bytes == 0)
    throw Error(Fault::kInvalidArgument, "0 bytes of pinned memory were asked for; ask for at least 1");
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* start = std::aligned_alloc(page, RoundUpToPages(bytes));
  if (start == nullptr) {
    throw Error(Fault::kOutOfMemory, "the host has no " + std::to_string(bytes) + " bytes left to pin");
  }
  std::lock_guard lock(mutex_);
  allocations_.emplace(reinterpret_cast<std::uintptr_t>(start), bytes);
  return start;
}

void PinnedMemory::Free(void* start) {
  std::lock_guard lock(mutex_);
  if (allocations_.erase(reinterpret_cast<std::uintptr_t>(start)) == 0) {
    throw Error(Fault::kNotAllocated, "the address to free is not the start of a pinned allocation");
  }
  std::free(start);
}

bool PinnedMemory::Contains(const void* address) const {
  std::lock_guard lock(mutex_);
  return InOneOf(allocations_, address, 1);
}

}  // namespace ascend_emulator
