// SPDX-License-Identifier: Apache-2.0
//
// Reads /proc/PID/stat. kill(pid, 0) is not enough: it succeeds for a zombie and for a stranger with the same
// number.
#include "hccl/process.h"

#include <unistd.h>

#include <fstream>
#include <optional>
#include <sstream>
#include <string>

#include "hccl/error.h"

namespace ascend_emulator::hccl {
namespace {

struct Stat {
  char state;
  uint64_t start_ticks;
};

std::optional<Stat> ReadStat(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  // The second field is the command in parentheses and may itself hold blanks and parentheses.
  const size_t end_of_command = line.rfind(')');
  if (end_of_command == std::string::npos) return std::nullopt;
  std::istringstream fields(line.substr(end_of_command + 1));
  Stat stat{};
  fields >> stat.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  if (!(fields >> stat.start_ticks)) return std::nullopt;
  return stat;
}

}  // namespace

ProcessIdentity ProcessIdentity::Self() {
  const pid_t pid = getpid();
  const std::optional<Stat> stat = ReadStat(pid);
  if (!stat) throw Error(HCCL_E_SYSCALL, "/proc/self/stat cannot be read; mount /proc");
  return {pid, stat->start_ticks};
}

bool ProcessIdentity::Alive() const {
  const std::optional<Stat> stat = ReadStat(pid);
  return stat && stat->start_ticks == start_ticks && stat->state != 'Z' && stat->state != 'X';
}

}  // namespace ascend_emulator::hccl
