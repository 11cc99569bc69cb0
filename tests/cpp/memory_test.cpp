// SPDX-License-Identifier: Apache-2.0
//
// A device's memory: its budget, what fresh memory holds, and what may be freed.
#include "runtime/memory.h"

#include <cstdint>
#include <cstring>

#include "check.h"

using ascend_emulator::Fault;
using ascend_emulator::Memory;
using ascend_emulator::PinnedMemory;

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

void FreshMemoryIsAllOnes() {
  Memory memory(kMiB);
  const auto* bytes = static_cast<const std::uint8_t*>(memory.Allocate(10000));
  for (std::size_t i = 0; i < 10000; ++i)
    Expect(bytes[i] == 0xFF, "byte " + std::to_string(i) + " to be 0xFF");
}

void MemoryOfAnEarlierAllocationIsFreshAgain() {
  Memory memory(kMiB);
  void* first = memory.Allocate(kMiB);
  std::memset(first, 0, kMiB);
  memory.Free(first);
  const auto* bytes = static_cast<const std::uint8_t*>(memory.Allocate(kMiB));
  Expect(bytes[0] == 0xFF && bytes[kMiB - 1] == 0xFF, "the second allocation to hold 0xFF");
}

void TheWholeBudgetCanBeUsedAndNotAByteMore() {
  Memory memory(kMiB);
  void* all = memory.Allocate(kMiB);
  Expect(memory.FreeBytes() == 0, "0 bytes to be free");
  ExpectFault(Fault::kOutOfMemory, "one more byte to be refused", [&] { memory.Allocate(1); });
  memory.Free(all);
  Expect(memory.FreeBytes() == kMiB, "all bytes to be free again");
  ExpectFault(Fault::kOutOfMemory, "one byte over the budget to be refused",
              [&] { memory.Allocate(kMiB + 1); });
  memory.Allocate(kMiB);
}

void AnAbsurdSizeIsRefused() {
  Memory memory(kMiB);
  ExpectFault(Fault::kOutOfMemory, "2^64 - 1 bytes to be refused", [&] { memory.Allocate(SIZE_MAX); });
  Expect(memory.FreeBytes() == kMiB, "the budget to be untouched");
}

void OnlyTheStartOfAnAllocationCanBeFreedAndOnlyOnce() {
  Memory memory(kMiB);
  auto* start = static_cast<std::uint8_t*>(memory.Allocate(8192));
  ExpectFault(Fault::kNotAllocated, "an inner address to be refused", [&] { memory.Free(start + 4096); });
  memory.Free(start);
  ExpectFault(Fault::kNotAllocated, "a second free to be refused", [&] { memory.Free(start); });
}

void ARangeIsContainedIfItStaysInOneAllocation() {
  Memory memory(kMiB);
  const auto* start = static_cast<const std::uint8_t*>(memory.Allocate(4096));
  Expect(memory.Contains(start, 4096), "the whole allocation to be contained");
  Expect(memory.Contains(start + 4095, 1), "its last byte to be contained");
  Expect(!memory.Contains(start, 4097), "one byte more not to be contained");
  Expect(!memory.Contains(start + 4096, 1), "the byte behind it not to be contained");
  Expect(!memory.Contains(start - 1, 1), "the byte before it not to be contained");
  Expect(!memory.Contains(start + 1, SIZE_MAX), "a range that wraps around not to be contained");
}

void PinnedMemoryIsKnownUntilItIsFreed() {
  auto& pinned = PinnedMemory::Get();
  auto* start = static_cast<std::uint8_t*>(pinned.Allocate(100));
  Expect(pinned.Contains(start + 99), "the last byte to be pinned");
  Expect(!pinned.Contains(start + 100), "the byte behind it not to be pinned");
  pinned.Free(start);
  Expect(!pinned.Contains(start), "freed memory not to be pinned");
  ExpectFault(Fault::kNotAllocated, "a second free to be refused", [&] { pinned.Free(start); });
}

}  // namespace

int main() {
  return RunAll({
      {"fresh memory is all ones", FreshMemoryIsAllOnes},
      {"memory of an earlier allocation is fresh again", MemoryOfAnEarlierAllocationIsFreshAgain},
      {"the whole budget can be used and not a byte more", TheWholeBudgetCanBeUsedAndNotAByteMore},
      {"an absurd size is refused", AnAbsurdSizeIsRefused},
      {"only the start of an allocation can be freed, and only once",
       OnlyTheStartOfAnAllocationCanBeFreedAndOnlyOnce},
      {"a range is contained if it stays in one allocation", ARangeIsContainedIfItStaysInOneAllocation},
      {"pinned memory is known until it is freed", PinnedMemoryIsKnownUntilItIsFreed},
  });
}
