// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory.h"

#include <sys/mman.h>
#include <unistd.h>

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
  const auto first = reinterpret_cast<std::uintptr_t>(start);
  std::lock_guard lock(mutex_);
  auto after = allocations_.upper_bound(first);
  if (after == allocations_.begin()) return false;
  const auto& [base, size] = *--after;
  return first - base < size && bytes <= size - (first - base);
}

std::size_t Memory::FreeBytes() const {
  std::lock_guard lock(mutex_);
  return budget_bytes_ - used_bytes_;
}

}  // namespace ascend_emulator
