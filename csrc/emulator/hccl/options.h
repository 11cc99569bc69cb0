// SPDX-License-Identifier: Apache-2.0
//
// What a user can set about a communicator: CANN's environment variables and the configuration structure of
// the call that makes it.
#pragma once

#include <acl/acl.h>

#include "hccl/communicator.h"
#include "third_party/hccl/inc/hccl/hccl.h"

namespace ascend_emulator::hccl {

/// Options from the environment:
///   HCCL_CONNECT_TIMEOUT  seconds to wait for all ranks at the start; default 120
///   HCCL_EXEC_TIMEOUT     seconds an operation waits for a peer without progress; default 1836, 0: for ever
///   HCCL_BUFFSIZE         MiB that all rings of a communicator may take together; default 200
/// and from `config`, which wins and may be null. Other fields of the structure change how fast a card is,
/// not what it computes. Throws Error(HCCL_E_PARA) for a value that is not understood. The name stays empty
/// unless it was set.
CommunicatorOptions ReadOptions(const HcclCommConfig* config);

}  // namespace ascend_emulator::hccl
