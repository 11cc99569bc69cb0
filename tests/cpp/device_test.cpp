// SPDX-License-Identifier: Apache-2.0
//
// Devices: which are visible, which is current, and what a forked process may do.
#include "runtime/device.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"
#include "runtime/config.h"

using ascend_emulator::Device;
using ascend_emulator::Fault;
using ascend_emulator::VisibleDevices;

namespace {

std::string Text(const std::vector<int>& numbers) {
  std::string text;
  for (const int number : numbers) text += std::to_string(number) + " ";
  return text;
}

void VisibleDevicesEndBeforeTheFirstBadEntry() {
  struct Row {
    const char* list;
    std::vector<int> expected;
  };
  const Row rows[] = {
      {nullptr, {0, 1, 2, 3}}, {"", {}},   {"2", {2}},    {"3,0", {3, 0}}, {"1,4,0", {1}},   {"1,1,0", {1}},
      {"0,x,1", {0}},          {"-1", {}}, {"0,,1", {0}}, {"0, 1", {0}},   {"0,1,", {0, 1}}, {"0,1x,2", {0}},
  };
  for (const Row& row : rows) {
    const auto found = VisibleDevices(row.list, 4);
    const std::string list = row.list == nullptr ? "(unset)" : row.list;
    Expect(found == row.expected,
           "'" + list + "' of 4 devices to leave " + Text(row.expected) + "and not " + Text(found));
  }
}

void EachThreadHasItsOwnCurrentDevice() {
  Device::SetCurrent(1);
  bool had_one = true;
  int chosen = -1;
  std::thread([&] {
    had_one = Device::HasCurrent();
    Device::SetCurrent(0);
    chosen = Device::Current().index();
  }).join();
  Expect(!had_one, "a new thread to have no current device");
  Expect(chosen == 0 && Device::Current().index() == 1, "the two threads to keep different devices");
}

void NumbersOutOfRangeAreRefused() {
  Expect(Device::Count() == 2, "2 devices");
  ExpectFault(Fault::kInvalidDevice, "device 2 to be refused", [] { Device::SetCurrent(2); });
  ExpectFault(Fault::kInvalidDevice, "device -1 to be refused", [] { Device::SetCurrent(-1); });
}

void ThePhysicalNumberIsKept() {
  Expect(Device::At(0).physical_index() == 3 && Device::At(1).physical_index() == 1,
         "devices 3 and 1 of the machine");
}

void AnAddressHasAnOwner() {
  void* start = Device::At(1).memory().Allocate(4096);
  Expect(Device::Owning(start, 4096) == &Device::At(1), "device 1 to own its memory");
  int local = 0;
  Expect(Device::Owning(&local, sizeof(local)) == nullptr, "nobody to own host memory");
  Device::At(1).memory().Free(start);
}

void AForkedProcessMayCountDevicesOnly() {
  Device::SetCurrent(0);
  Device::Current().DefaultStream().Enqueue([] {});
  Device::Current().Synchronize();
  const pid_t child = fork();
  if (child == 0) {
    int wrong = Device::Count() == 2 ? 0 : 1;
    const auto refused = [](void (*action)()) {
      try {
        action();
        return false;
      } catch (const ascend_emulator::Error& error) {
        return error.fault() == Fault::kForkedProcess;
      }
    };
    if (!refused([] { Device::SetCurrent(0); })) wrong |= 2;
    if (!refused([] { Device::At(0).DefaultStream().Enqueue([] {}); })) wrong |= 4;
    if (!refused([] { Device::At(0).DefaultStream().Synchronize(); })) wrong |= 8;
    _exit(wrong);
  }
  int status = -1;
  waitpid(child, &status, 0);
  Expect(WIFEXITED(status) && WEXITSTATUS(status) == 0,
         "the child to count 2 devices and to be refused the rest, and its status was " +
             std::to_string(status));
}

}  // namespace

int main() {
  setenv("ASCEND_EMULATOR_DEVICES", "4", 1);
  setenv("ASCEND_EMULATOR_MEMORY", "1048576", 1);
  setenv("ASCEND_RT_VISIBLE_DEVICES", "3,1", 1);
  return RunAll({
      {"visible devices end before the first bad entry", VisibleDevicesEndBeforeTheFirstBadEntry},
      {"each thread has its own current device", EachThreadHasItsOwnCurrentDevice},
      {"numbers out of range are refused", NumbersOutOfRangeAreRefused},
      {"the physical number is kept", ThePhysicalNumberIsKept},
      {"an address has an owner", AnAddressHasAnOwner},
      {"a forked process may count devices only", AForkedProcessMayCountDevicesOnly},
  });
}
