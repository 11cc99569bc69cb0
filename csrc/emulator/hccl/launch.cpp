// SPDX-License-Identifier: Apache-2.0
//
// Handles, error reports and launches; see launch.h.
#include "hccl/launch.h"

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "acl/error.h"
#include "runtime/stream.h"

namespace ascend_emulator::hccl {
namespace {

class Registry {
 public:
  // Never destroyed: torch_npu's threads still ask for errors while the process exits.
  static Registry& Get() {
    static Registry& registry = *new Registry;
    return registry;
  }

  HcclComm Add(std::shared_ptr<Communicator> communicator) {
    std::lock_guard lock(mutex_);
    const HcclComm handle = communicator.get();
    live_.emplace(handle, std::move(communicator));
    return handle;
  }

  std::shared_ptr<Communicator> Find(HcclComm handle) const {
    std::lock_guard lock(mutex_);
    return At(handle)->second;
  }

  std::shared_ptr<Communicator> Take(HcclComm handle) {
    std::lock_guard lock(mutex_);
    const auto found = At(handle);
    std::shared_ptr<Communicator> communicator = found->second;
    live_.erase(found);
    return communicator;
  }

 private:
  using Map = std::unordered_map<HcclComm, std::shared_ptr<Communicator>>;

  Map::const_iterator At(HcclComm handle) const {
    if (handle == nullptr) throw Error(HCCL_E_PTR, "the communicator is a null pointer");
    const auto found = live_.find(handle);
    if (found == live_.end()) throw Error(HCCL_E_PARA, "the handle is not that of a live communicator");
    return found;
  }

  mutable std::mutex mutex_;
  Map live_;
};

struct Group {
  int depth = 0;
  std::vector<Messages> waiting;
};

thread_local Group group;

void LaunchMessages(const char* call, Messages messages) {
  Launch(call, messages.communicator, messages.stream,
         [sends = std::move(messages.sends), receives = std::move(messages.receives)](Communicator& comm) {
           // Messages of one group may have different types, so only their bytes are compared.
           comm.Exchange({HCCL_CMD_SEND, HCCL_DATA_TYPE_UINT8, 0}, sends, receives);
         });
}

template <typename T>
void Append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

HcclComm Register(std::shared_ptr<Communicator> communicator) {
  return Registry::Get().Add(std::move(communicator));
}

std::shared_ptr<Communicator> Find(HcclComm handle) { return Registry::Get().Find(handle); }

std::shared_ptr<Communicator> Unregister(HcclComm handle) { return Registry::Get().Take(handle); }

HcclResult Report(const char* call, HcclResult code, const char* why) {
  const std::string sentence = std::string(call) + ": " + why;
  std::fprintf(stderr, "ascend emulator: %s\n", sentence.c_str());
  // The runtime's code is not used: HCCL's caller takes the sentence only.
  ascend_emulator::Report(ACL_ERROR_INTERNAL_ERROR, sentence);
  return code;
}

void Launch(const char* call, std::shared_ptr<Communicator> communicator, aclrtStream handle,
            std::function<void(Communicator&)> operation) {
  Stream& stream = Stream::From(handle);
  auto reported = [call, operation = std::move(operation)](Communicator& comm) {
    try {
      operation(comm);
    } catch (const Error& error) {
      Report(call, error.code(), error.what());
      throw;
    }
  };
  communicator->Issue(std::move(reported),
                      [&](std::function<void()> task) { stream.Enqueue(std::move(task)); });
}

void LaunchOrGroup(const char* call, Messages messages) {
  if (group.depth == 0) return LaunchMessages(call, std::move(messages));
  const auto same = std::find_if(group.waiting.begin(), group.waiting.end(), [&](const Messages& other) {
    return other.communicator == messages.communicator && other.stream == messages.stream;
  });
  if (same == group.waiting.end()) {
    group.waiting.push_back(std::move(messages));
  } else {
    Append(same->sends, messages.sends);
    Append(same->receives, messages.receives);
  }
}

void StartGroup() { ++group.depth; }

void EndGroup() {
  if (group.depth == 0) throw Error(HCCL_E_PARA, "no group was started in this thread");
  if (--group.depth > 0) return;
  const std::vector<Messages> waiting = std::exchange(group.waiting, {});
  for (const Messages& messages : waiting) LaunchMessages("HcclGroupEnd", messages);
}

}  // namespace ascend_emulator::hccl
