// SPDX-License-Identifier: Apache-2.0
#include "runtime/config.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string_view>

#include "runtime/error.h"

namespace ascend_emulator {
namespace {

std::optional<std::size_t> ParseNumber(std::string_view text) {
  std::size_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return number;
}

std::size_t NumberFromEnvironment(const char* name, std::size_t fallback, std::size_t least,
                                  std::size_t most) {
  const char* text = std::getenv(name);
  if (text == nullptr) return fallback;
  const auto number = ParseNumber(text);
  if (!number || *number < least || *number > most) {
    throw Error(Fault::kBadConfiguration, std::string(name) + " is '" + text +
                                              "'; set it to a whole number from " + std::to_string(least) +
                                              " to " + std::to_string(most));
  }
  return *number;
}

Config FromEnvironment() {
  constexpr std::size_t kMostDevices = 64;
  constexpr std::size_t kLeastMemory = std::size_t{1} << 20;
  constexpr std::size_t kMostMemory = std::size_t{1} << 40;
  Config config;
  config.num_devices = static_cast<int>(NumberFromEnvironment(
      "ASCEND_EMULATOR_DEVICES", static_cast<std::size_t>(config.num_devices), 1, kMostDevices));
  config.memory_bytes =
      NumberFromEnvironment("ASCEND_EMULATOR_MEMORY", config.memory_bytes, kLeastMemory, kMostMemory);
  if (const char* soc_name = std::getenv("ASCEND_EMULATOR_SOC")) config.soc_name = soc_name;
  config.visible_devices = VisibleDevices(std::getenv("ASCEND_RT_VISIBLE_DEVICES"), config.num_devices);
  return config;
}

}  // namespace

const Config& Config::Get() {
  static const Config& config = *new Config(FromEnvironment());
  return config;
}

std::vector<int> VisibleDevices(const char* list, int num_devices) {
  std::vector<int> devices;
  if (list == nullptr) {
    devices.resize(static_cast<std::size_t>(num_devices));
    std::iota(devices.begin(), devices.end(), 0);
    return devices;
  }
  std::string_view rest = list;
  while (!rest.empty()) {
    const std::size_t comma = std::min(rest.find(','), rest.size());
    const auto device = ParseNumber(rest.substr(0, comma));
    if (!device || *device >= static_cast<std::size_t>(num_devices)) break;
    const int physical = static_cast<int>(*device);
    if (std::find(devices.begin(), devices.end(), physical) != devices.end()) break;
    devices.push_back(physical);
    rest.remove_prefix(std::min(comma + 1, rest.size()));
  }
  return devices;
}

}  // namespace ascend_emulator
