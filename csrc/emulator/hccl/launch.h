// SPDX-License-Identifier: Apache-2.0
//
// From HCCL's C calls to communicators: handles, errors as codes, and operations as work on a stream.
#pragma once

#include <acl/acl.h>

#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "hccl/communicator.h"
#include "runtime/error.h"
#include "third_party/hccl/inc/hccl/hccl.h"

namespace ascend_emulator::hccl {

/// Makes `communicator` known and returns its handle.
HcclComm Register(std::shared_ptr<Communicator> communicator);

/// The communicator behind a handle. Throws Error: HCCL_E_PTR for null, HCCL_E_PARA for a handle that is not
/// live.
std::shared_ptr<Communicator> Find(HcclComm handle);

/// Forgets the handle. Throws as Find does.
std::shared_ptr<Communicator> Unregister(HcclComm handle);

/// Prints why `call` failed, keeps it for aclGetRecentErrMsg, and returns `code`.
HcclResult Report(const char* call, HcclResult code, const char* why);

/// Runs the body of the entry point `call`; its exceptions become HCCL's codes.
template <typename Body>
HcclResult Guarded(const char* call, Body body) {
  try {
    body();
    return HCCL_SUCCESS;
  } catch (const Error& error) {
    return Report(call, error.code(), error.what());
  } catch (const ascend_emulator::Error& error) {
    return Report(call, HCCL_E_RUNTIME, error.what());
  } catch (const std::bad_alloc&) {
    return Report(call, HCCL_E_MEMORY, "no memory for the call's own data");
  }
}

/// Puts `operation` on the stream and returns at once. If it fails there, it prints why, and the stream is
/// broken.
void Launch(const char* call, std::shared_ptr<Communicator> communicator, aclrtStream stream,
            std::function<void(Communicator&)> operation);

/// Messages of one call on one stream, moved in one exchange.
struct Messages {
  std::shared_ptr<Communicator> communicator;
  aclrtStream stream;
  std::vector<Send> sends;
  std::vector<Receive> receives;
};

/// Launches the messages, or keeps them until the outermost group of this thread ends.
void LaunchOrGroup(const char* call, Messages messages);

/// Groups nest. What is sent and received inside is launched when the outermost group ends, as one exchange
/// for each communicator and stream.
void StartGroup();

/// Throws Error(HCCL_E_PARA) if no group was started in this thread.
void EndGroup();

}  // namespace ascend_emulator::hccl
