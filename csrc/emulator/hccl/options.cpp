// SPDX-License-Identifier: Apache-2.0
//
// Reads the options of communicators; see options.h.
#include "hccl/options.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "hccl/error.h"

namespace ascend_emulator::hccl {
namespace {

constexpr int64_t kDefaultConnectTimeoutS = 120;
constexpr int64_t kDefaultExecTimeoutS = 1836;

/// The first bytes of a configuration, which older and newer callers have in common.
struct ConfigHead {
  size_t size;
  uint32_t magic;
  uint32_t version;
  uint64_t reserved;
};
static_assert(sizeof(ConfigHead) == HCCL_COMM_CONFIG_INFO_BYTES);

int64_t FromEnvironment(const char* name, int64_t lowest, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*end == '\0' && value >= lowest && value <= std::numeric_limits<int32_t>::max()) return value;
  throw Error(HCCL_E_PARA, std::string(name) + " is '" + text + "'; set it to a whole number of at least " +
                               std::to_string(lowest));
}

/// `config` with the fields that its caller's version lacks at their defaults.
HcclCommConfig Complete(const HcclCommConfig* config) {
  HcclCommConfig complete;
  HcclCommConfigInit(&complete);
  if (config == nullptr) return complete;
  ConfigHead head;
  std::memcpy(&head, config, sizeof head);
  if (head.magic != HCCL_COMM_CONFIG_MAGIC_WORD || head.size < sizeof head) {
    throw Error(HCCL_E_PARA,
                "the communicator's configuration is not initialised; call HcclCommConfigInit first");
  }
  std::memcpy(&complete, config, std::min(head.size, sizeof complete));
  return complete;
}

std::optional<std::chrono::seconds> ExchangeTimeout(const HcclCommConfig& config) {
  const bool configured = config.hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET;
  const int64_t seconds =
      configured ? config.hcclExecTimeOut : FromEnvironment("HCCL_EXEC_TIMEOUT", 0, kDefaultExecTimeoutS);
  if (seconds < 0)
    throw Error(HCCL_E_PARA, "hcclExecTimeOut is negative; set seconds, or 0 to wait for ever");
  if (seconds == 0) return std::nullopt;
  return std::chrono::seconds(seconds);
}

size_t BufferBytes(const HcclCommConfig& config) {
  const bool configured = config.hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET;
  const int64_t mebibytes =
      configured ? config.hcclBufferSize : FromEnvironment("HCCL_BUFFSIZE", 1, HCCL_COMM_DEFAULT_BUFFSIZE);
  return static_cast<size_t>(mebibytes) << 20;
}

}  // namespace

CommunicatorOptions ReadOptions(const HcclCommConfig* config) {
  const HcclCommConfig complete = Complete(config);
  const size_t name_length = strnlen(complete.hcclCommName, COMM_NAME_MAX_LENGTH);
  if (name_length == COMM_NAME_MAX_LENGTH) {
    throw Error(HCCL_E_PARA, "the communicator's name has no end; use at most 127 characters");
  }
  return {std::string(complete.hcclCommName, name_length), BufferBytes(complete),
          std::chrono::seconds(FromEnvironment("HCCL_CONNECT_TIMEOUT", 1, kDefaultConnectTimeoutS)),
          ExchangeTimeout(complete)};
}

}  // namespace ascend_emulator::hccl
