// SPDX-License-Identifier: Apache-2.0
#include "runtime/device.h"

#include <pthread.h>

#include <atomic>
#include <string>
#include <vector>

#include "runtime/config.h"
#include "runtime/error.h"

namespace ascend_emulator {

// All devices of the process. Never destroyed: threads of torch_npu still call while the process exits.
class Machine {
 public:
  static Machine& Get() {
    static Machine& machine = *new Machine;
    return machine;
  }

  std::vector<std::unique_ptr<Device>> devices;

 private:
  Machine() {
    const Config& config = Config::Get();
    int index = 0;
    for (const int physical_index : config.visible_devices) {
      devices.emplace_back(new Device(index++, physical_index, config.memory_bytes));
    }
  }
};

namespace {

constexpr int kNone = -1;
thread_local int current_device = kNone;

std::atomic<bool> used{false};
std::atomic<bool> forked_after_use{false};

void NoteFork() {
  if (used) forked_after_use = true;
}

}  // namespace

int Device::Count() { return static_cast<int>(Config::Get().visible_devices.size()); }

Device& Device::At(int index) {
  if (index < 0 || index >= Count()) {
    throw Error(Fault::kInvalidDevice, "device " + std::to_string(index) + " was asked for and there are " +
                                           std::to_string(Count()) +
                                           "; see ASCEND_RT_VISIBLE_DEVICES and ASCEND_EMULATOR_DEVICES");
  }
  return *Machine::Get().devices[static_cast<std::size_t>(index)];
}

Device& Device::Current() {
  if (!HasCurrent()) {
    throw Error(Fault::kNoCurrentDevice, "this thread has no current device; call aclrtSetDevice first");
  }
  return At(current_device);
}

bool Device::HasCurrent() { return current_device != kNone; }

void Device::SetCurrent(int index) {
  RefuseAfterFork();
  At(index);
  static std::once_flag watch_forks;
  std::call_once(watch_forks, [] { pthread_atfork(nullptr, nullptr, NoteFork); });
  used = true;
  current_device = index;
}

void Device::ClearCurrent() { current_device = kNone; }

Device* Device::Owning(const void* start, std::size_t bytes) {
  for (const auto& device : Machine::Get().devices) {
    if (device->memory().Contains(start, bytes)) return device.get();
  }
  return nullptr;
}

void Device::RefuseAfterFork() {
  if (forked_after_use) {
    throw Error(
        Fault::kForkedProcess,
        "this process was forked from one that had used a device; start it with the spawn method instead");
  }
}

Stream& Device::DefaultStream() {
  std::call_once(default_stream_once_, [this] { default_stream_ = &Stream::Create(index_); });
  return *default_stream_;
}

void Device::Synchronize() {
  for (const auto& stream : Stream::Of(index_)) stream->Synchronize();
}

bool Device::SynchronizeFor(std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  for (const auto& stream : Stream::Of(index_)) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    if (!stream->SynchronizeFor(std::max(left, std::chrono::milliseconds::zero()))) return false;
  }
  return true;
}

}  // namespace ascend_emulator
