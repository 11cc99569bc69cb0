// SPDX-License-Identifier: Apache-2.0
//
// libhccl: making, asking and destroying communicators, and the settings of the whole library.
//
// Ways to make one that are not emulated (rank tables, several roots, several ranks in one process, parts of
// another communicator) and calls for windows of memory and for suspension are absent: torch_npu looks all of
// them up by name, and then does without or raises with the name.
#include <acl/acl.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "hccl/launch.h"
#include "hccl/options.h"
#include "third_party/hccl/inc/hccl/hccl.h"

using namespace ascend_emulator::hccl;

namespace {

void RequireNonNull(const char* name, const void* pointer) {
  if (pointer == nullptr) throw Error(HCCL_E_PTR, std::string(name) + " is a null pointer");
}

std::string DefaultName(const Invitation& invitation) {
  char name[COMM_NAME_MAX_LENGTH];
  std::snprintf(name, sizeof name, "emulated_%d_%016llx", invitation.founder.pid,
                static_cast<unsigned long long>(invitation.token[0]));
  return name;
}

HcclComm Join(uint32_t num_ranks, const HcclRootInfo* root_info, uint32_t rank,
              const HcclCommConfig* config) {
  RequireNonNull("rootInfo", root_info);
  Invitation invitation;
  std::memcpy(&invitation, root_info->internal, sizeof invitation);
  CommunicatorOptions options = ReadOptions(config);
  if (options.name.empty()) options.name = DefaultName(invitation);
  return Register(std::make_shared<Communicator>(invitation, num_ranks, rank, std::move(options)));
}

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root_info) {
  static_assert(sizeof(Invitation) <= HCCL_ROOT_INFO_BYTES);
  return Guarded("HcclGetRootInfo", [&] {
    RequireNonNull("rootInfo", root_info);
    const Invitation invitation = Invitation::Found();
    std::memset(root_info->internal, 0, HCCL_ROOT_INFO_BYTES);
    std::memcpy(root_info->internal, &invitation, sizeof invitation);
  });
}

HcclResult HcclCommInitRootInfo(uint32_t num_ranks, const HcclRootInfo* root_info, uint32_t rank,
                                HcclComm* comm) {
  return Guarded("HcclCommInitRootInfo", [&] {
    RequireNonNull("comm", comm);
    *comm = Join(num_ranks, root_info, rank, nullptr);
  });
}

HcclResult HcclCommInitRootInfoConfig(uint32_t num_ranks, const HcclRootInfo* root_info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm) {
  return Guarded("HcclCommInitRootInfoConfig", [&] {
    RequireNonNull("config", config);
    RequireNonNull("comm", comm);
    *comm = Join(num_ranks, root_info, rank, config);
  });
}

HcclResult HcclCommDestroy(HcclComm comm) {
  return Guarded("HcclCommDestroy", [&] { Unregister(comm)->Abort(); });
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
  return Guarded("HcclGetCommAsyncError", [&] {
    RequireNonNull("asyncError", error);
    *error = Find(comm)->AsyncError();
  });
}

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  return Guarded("HcclGetCommName", [&] {
    RequireNonNull("commName", name);
    std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", Find(comm)->name().c_str());
  });
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* rank_size) {
  return Guarded("HcclGetRankSize", [&] {
    RequireNonNull("rankSize", rank_size);
    *rank_size = Find(comm)->size();
  });
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  return Guarded("HcclGetRankId", [&] {
    RequireNonNull("rank", rank);
    *rank = Find(comm)->rank();
  });
}

// Every field of the configuration that this version of the header has is understood.
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

// Reductions are deterministic whatever is asked for (reduce.h).
HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue value) {
  return Guarded("HcclSetConfig", [&] {
    if (config != HCCL_DETERMINISTIC) {
      throw Error(HCCL_E_NOT_SUPPORT,
                  "HcclConfig " + std::to_string(config) + " is not emulated; see docs/emulator.md");
    }
    if (value.value != 0 && value.value != 1) throw Error(HCCL_E_PARA, "HCCL_DETERMINISTIC must be 0 or 1");
  });
}

HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue* value) {
  return Guarded("HcclGetConfig", [&] {
    RequireNonNull("configValue", value);
    if (config != HCCL_DETERMINISTIC) {
      throw Error(HCCL_E_NOT_SUPPORT,
                  "HcclConfig " + std::to_string(config) + " is not emulated; see docs/emulator.md");
    }
    value->value = 1;
  });
}

const char* HcclGetErrorString(HcclResult code) {
  switch (code) {
    case HCCL_SUCCESS:
      return "no error";
    case HCCL_E_PARA:
      return "parameter error";
    case HCCL_E_PTR:
      return "empty pointer";
    case HCCL_E_MEMORY:
      return "memory error";
    case HCCL_E_INTERNAL:
      return "internal error";
    case HCCL_E_NOT_SUPPORT:
      return "not support feature";
    case HCCL_E_NOT_FOUND:
      return "not found specific resource";
    case HCCL_E_UNAVAIL:
      return "resource unavailable";
    case HCCL_E_SYSCALL:
      return "call system interface error";
    case HCCL_E_TIMEOUT:
      return "timeout";
    case HCCL_E_OPEN_FILE_FAILURE:
      return "open file fail";
    case HCCL_E_RUNTIME:
      return "call runtime api fail";
    case HCCL_E_REMOTE:
      return "error cqe";
    default:
      return "unknown error";
  }
}

}  // extern "C"
