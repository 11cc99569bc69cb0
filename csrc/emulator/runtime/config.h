// SPDX-License-Identifier: Apache-2.0
//
// What machine is emulated. The launcher, `python -m vllm_ascend.emulator`, says so by environment variables.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace ascend_emulator {

struct Config {
  // Devices in the machine, before ASCEND_RT_VISIBLE_DEVICES hides some: ASCEND_EMULATOR_DEVICES.
  int num_devices = 8;
  // Budget of each device: ASCEND_EMULATOR_MEMORY.
  std::size_t memory_bytes = std::size_t{4} << 30;
  // The chip that aclrtGetSocName reports: ASCEND_EMULATOR_SOC.
  std::string soc_name = "Ascend910B3";
  // Physical number of each visible device, in the order in which this process numbers them.
  std::vector<int> visible_devices;

  // Reads the environment on first use. Throws Error(kBadConfiguration) as long as a variable is unusable.
  static const Config& Get();
};

// The devices that ASCEND_RT_VISIBLE_DEVICES leaves: as in CANN, the list ends before its first bad entry
// (not a number, out of range, or named twice). Null means that the variable is not set: all devices.
std::vector<int> VisibleDevices(const char* list, int num_devices);

}  // namespace ascend_emulator
