// SPDX-License-Identifier: Apache-2.0
//
// Memory and copies. A copy must name its sides rightly and stay inside one allocation on the device side:
// where a card's DMA engine would fault, the call is refused.
#include "runtime/memory.h"

#include <acl/acl.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "acl/error.h"
#include "runtime/device.h"

namespace {

using ascend_emulator::Device;
using ascend_emulator::Error;
using ascend_emulator::Fault;
using ascend_emulator::Guarded;
using ascend_emulator::PinnedMemory;
using ascend_emulator::RequireNonNull;
using ascend_emulator::Stream;

bool OnDevice(const void* start, std::size_t bytes) { return Device::Owning(start, bytes) != nullptr; }

void RequireSide(const char* side, const void* start, std::size_t bytes, bool expect_device) {
  // For host memory the first byte decides: a range of host memory may end right before device memory.
  const bool is_device = OnDevice(start, expect_device ? bytes : 1);
  if (is_device == expect_device) return;
  throw Error(Fault::kInvalidArgument,
              std::string("the ") + side + " of a copy of " + std::to_string(bytes) + " bytes is " +
                  (expect_device ? "not inside one allocation of device memory" : "device memory") +
                  ", and the copy's kind says otherwise");
}

struct Sides {
  bool from_device;
  bool to_device;
};

Sides SidesOf(aclrtMemcpyKind kind, const void* to, const void* from) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST:
      return {false, false};
    case ACL_MEMCPY_HOST_TO_DEVICE:
    case ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE:
      return {false, true};
    case ACL_MEMCPY_DEVICE_TO_HOST:
      return {true, false};
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INNER_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INTER_DEVICE_TO_DEVICE:
      return {true, true};
    case ACL_MEMCPY_DEFAULT:
      return {OnDevice(from, 1), OnDevice(to, 1)};
  }
  throw Error(Fault::kInvalidArgument, "a copy has the unknown kind " + std::to_string(kind));
}

void CheckCopy(void* to, std::size_t to_bytes, const void* from, std::size_t bytes, aclrtMemcpyKind kind) {
  RequireNonNull("a copy", to, from);
  if (bytes > to_bytes) {
    throw Error(Fault::kInvalidArgument, "a copy of " + std::to_string(bytes) +
                                             " bytes has a destination of " + std::to_string(to_bytes));
  }
  if (bytes == 0) return;
  const Sides sides = SidesOf(kind, to, from);
  RequireSide("source", from, bytes, sides.from_device);
  RequireSide("destination", to, bytes, sides.to_device);
}

void CheckFill(void* start, std::size_t capacity_bytes, std::size_t bytes) {
  RequireNonNull("a fill", start);
  if (bytes > capacity_bytes) {
    throw Error(Fault::kInvalidArgument, "a fill of " + std::to_string(bytes) +
                                             " bytes has a destination of " + std::to_string(capacity_bytes));
  }
}

}  // namespace

extern "C" {

// From the device's budget, filled with 0xFF. Policies about page sizes change nothing.
aclError aclrtMalloc(void** start, size_t bytes, aclrtMemMallocPolicy) {
  return Guarded([&] {
    RequireNonNull("aclrtMalloc", start);
    Device::RefuseAfterFork();
    *start = Device::Current().memory().Allocate(bytes);
  });
}

// Without the 32 spare bytes that CANN adds behind an allocation for its DMA engine.
aclError aclrtMallocAlign32(void** start, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(start, bytes, policy);
}

aclError aclrtFree(void* start) {
  return Guarded([&] {
    RequireNonNull("aclrtFree", start);
    Device* owner = Device::Owning(start, 1);
    if (owner == nullptr) throw Error(Fault::kNotAllocated, "the address to free is not device memory");
    owner->memory().Free(start);
  });
}

aclError aclrtMallocHost(void** start, size_t bytes) {
  return Guarded([&] {
    RequireNonNull("aclrtMallocHost", start);
    *start = PinnedMemory::Get().Allocate(bytes);
  });
}

aclError aclrtFreeHost(void* start) {
  return Guarded([&] {
    RequireNonNull("aclrtFreeHost", start);
    PinnedMemory::Get().Free(start);
  });
}

// At once, in the calling thread: waits for no stream.
aclError aclrtMemcpy(void* to, size_t to_bytes, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  return Guarded([&] {
    Device::RefuseAfterFork();
    CheckCopy(to, to_bytes, from, bytes, kind);
    std::memmove(to, from, bytes);
  });
}

// Reads the source when its turn in the stream comes, also from pageable host memory.
aclError aclrtMemcpyAsync(void* to, size_t to_bytes, const void* from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  return Guarded([&] {
    CheckCopy(to, to_bytes, from, bytes, kind);
    Stream::From(stream).Enqueue([=] { std::memmove(to, from, bytes); });
  });
}

aclError aclrtMemset(void* start, size_t capacity_bytes, int32_t value, size_t bytes) {
  return Guarded([&] {
    Device::RefuseAfterFork();
    CheckFill(start, capacity_bytes, bytes);
    std::memset(start, value, bytes);
  });
}

aclError aclrtMemsetAsync(void* start, size_t capacity_bytes, int32_t value, size_t bytes,
                          aclrtStream stream) {
  return Guarded([&] {
    CheckFill(start, capacity_bytes, bytes);
    Stream::From(stream).Enqueue([=] { std::memset(start, value, bytes); });
  });
}

// There is one kind of device memory; every attribute asks about the same budget.
aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total_bytes) {
  return Guarded([&] {
    RequireNonNull("aclrtGetMemInfo", free_bytes, total_bytes);
    const auto& memory = Device::Current().memory();
    *free_bytes = memory.FreeBytes();
    *total_bytes = memory.TotalBytes();
  });
}

aclError aclrtPointerGetAttributes(const void* start, aclrtPtrAttributes* attributes) {
  return Guarded([&] {
    RequireNonNull("aclrtPointerGetAttributes", start, attributes);
    *attributes = {};
    attributes->pageSize = static_cast<uint32_t>(sysconf(_SC_PAGESIZE));
    if (const Device* owner = Device::Owning(start, 1)) {
      attributes->location = {static_cast<uint32_t>(owner->index()), ACL_MEM_LOCATION_TYPE_DEVICE};
    } else if (PinnedMemory::Get().Contains(start)) {
      attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
    } else {
      attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    }
  });
}

}  // extern "C"
