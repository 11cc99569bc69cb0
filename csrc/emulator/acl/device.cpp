// SPDX-License-Identifier: Apache-2.0
//
// Devices and contexts. Each device has one context, the primary one; its handle is the device itself.
#include "runtime/device.h"

#include <acl/acl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "acl/error.h"
#include "runtime/config.h"

namespace {

using ascend_emulator::Config;
using ascend_emulator::Device;
using ascend_emulator::Error;
using ascend_emulator::Fault;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::RequireNonNull;

// Sizes of an Ascend 910B. Programs split work by them; the emulator's results do not depend on them.
constexpr int64_t kCubeCores = 20;
constexpr int64_t kVectorCores = 40;
constexpr int64_t kAiCpus = 6;
constexpr int64_t kL2Bytes = int64_t{192} << 20;
constexpr int64_t kUnifiedBufferBytes = int64_t{192} << 10;

Device& DeviceOfContext(aclrtContext context) {
  for (int index = 0; index < Device::Count(); ++index) {
    if (&Device::At(index) == context) return Device::At(index);
  }
  throw Error(Fault::kInvalidHandle, "the context handle is not that of a device's context");
}

int64_t Attribute(const Device& device, aclrtDevAttr attribute) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM:
      return kAiCpus;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      return kCubeCores;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      return kVectorCores;
    case ACL_DEV_ATTR_UBUF_PER_VECTOR_CORE:
      return kUnifiedBufferBytes;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      return static_cast<int64_t>(Config::Get().memory_bytes);
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      return kL2Bytes;
    case ACL_DEV_ATTR_PHY_CHIP_ID:
      return device.physical_index();
    case ACL_DEV_ATTR_IS_VIRTUAL:
      return 0;
    default:
      throw Error(Fault::kInvalidArgument,
                  "device attribute " + std::to_string(attribute) + " is not emulated; see docs/emulator.md");
  }
}

}  // namespace

extern "C" {

// What ASCEND_RT_VISIBLE_DEVICES leaves of ASCEND_EMULATOR_DEVICES.
aclError aclrtGetDeviceCount(uint32_t* count) {
  return Guarded([&] {
    RequireNonNull("aclrtGetDeviceCount", count);
    *count = static_cast<uint32_t>(Device::Count());
  });
}

aclError aclrtSetDevice(int32_t device) {
  return Guarded([&] { Device::SetCurrent(device); });
}

aclError aclrtGetDevice(int32_t* device) {
  return Guarded([&] {
    RequireNonNull("aclrtGetDevice", device);
    *device = Device::Current().index();
  });
}

// Waits for the device's work. Memory and streams stay until they are freed or the process ends.
aclError aclrtResetDevice(int32_t device) {
  return Guarded([&] {
    Device::At(device).Synchronize();
    if (Device::HasCurrent() && Device::Current().index() == device) Device::ClearCurrent();
  });
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  return Guarded([&] {
    RequireNonNull("aclrtGetCurrentContext", context);
    *context = &Device::Current();
  });
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  return Guarded([&] { Device::SetCurrent(DeviceOfContext(context).index()); });
}

aclError aclrtSynchronizeDevice() {
  return Guarded([] { Device::Current().Synchronize(); });
}

// `timeout` is in milliseconds; -1 waits for ever.
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  if (timeout == -1) return aclrtSynchronizeDevice();
  bool idle = false;
  const aclError code =
      Guarded([&] { idle = Device::Current().SynchronizeFor(std::chrono::milliseconds(timeout)); });
  if (code != ACL_SUCCESS || idle) return code;
  return Report(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
                "the device still has work after " + std::to_string(timeout) + " ms");
}

const char* aclrtGetSocName() {
  try {
    return Config::Get().soc_name.c_str();
  } catch (const Error& error) {
    Report(error);
    return nullptr;
  }
}

// Sizes of an Ascend 910B, the memory budget, the physical number; other attributes are refused.
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t* value) {
  return Guarded([&] {
    RequireNonNull("aclrtGetDeviceInfo", value);
    *value = Attribute(Device::At(static_cast<int>(device)), attribute);
  });
}

// Sizes of an Ascend 910B, whatever the chip is called.
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t* value) {
  return Guarded([&] {
    RequireNonNull("aclGetDeviceCapability", value);
    switch (info) {
      case ACL_DEVICE_INFO_AI_CORE_NUM:
        *value = Attribute(Device::At(static_cast<int>(device)), ACL_DEV_ATTR_AICORE_CORE_NUM);
        return;
      case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
        *value = Attribute(Device::At(static_cast<int>(device)), ACL_DEV_ATTR_VECTOR_CORE_NUM);
        return;
      case ACL_DEVICE_INFO_L2_SIZE:
        *value = Attribute(Device::At(static_cast<int>(device)), ACL_DEV_ATTR_L2_CACHE_SIZE);
        return;
      default:
        throw Error(Fault::kInvalidArgument, "aclGetDeviceCapability was asked for " + std::to_string(info));
    }
  });
}

// Unlike between the cards of two machines, equal on two machines; never between two devices of one.
aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid* uuid) {
  return Guarded([&] {
    RequireNonNull("aclrtDeviceGetUuid", uuid);
    *uuid = {};
    std::snprintf(uuid->bytes, sizeof(uuid->bytes), "emulated-%d", Device::At(device).physical_index());
  });
}

// Every device's memory is the process's own.
aclError aclrtDeviceCanAccessPeer(int32_t* can_access, int32_t device, int32_t peer) {
  return Guarded([&] {
    RequireNonNull("aclrtDeviceCanAccessPeer", can_access);
    *can_access = &Device::At(device) != &Device::At(peer);
  });
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) {
  return Guarded([&] { Device::At(peer); });
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  return Guarded([&] {
    RequireNonNull("aclrtDeviceGetBareTgid", pid);
    *pid = getpid();
  });
}

}  // extern "C"
