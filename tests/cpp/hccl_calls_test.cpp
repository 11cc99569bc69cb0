// SPDX-License-Identifier: Apache-2.0
//
// What libhccl's calls answer: codes for bad arguments, one rank alone, and order between streams.
#include <acl/acl.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "gate.h"
#include "runtime/stream.h"
#include "third_party/hccl/inc/hccl/hccl.h"

using ascend_emulator::Stream;

namespace {

constexpr HcclDataType kFloat = HCCL_DATA_TYPE_FP32;

void ExpectCode(HcclResult expected, HcclResult found, const std::string& call) {
  Expect(found == expected,
         call + " to give " + std::to_string(expected) + ", and got " + std::to_string(found));
}

/// A communicator of this process alone.
class Alone {
 public:
  Alone() {
    HcclRootInfo root_info;
    ExpectCode(HCCL_SUCCESS, HcclGetRootInfo(&root_info), "HcclGetRootInfo");
    ExpectCode(HCCL_SUCCESS, HcclCommInitRootInfo(1, &root_info, 0, &comm), "HcclCommInitRootInfo");
  }
  ~Alone() { HcclCommDestroy(comm); }

  HcclComm comm = nullptr;
};

void OneRankReducesToItself() {
  const Alone alone;
  std::vector<float> send = {1, 2, 3}, recv(3);
  ExpectCode(HCCL_SUCCESS,
             HcclAllReduce(send.data(), recv.data(), 3, kFloat, HCCL_REDUCE_SUM, alone.comm, nullptr),
             "all-reduce");
  Stream::From(nullptr).Synchronize();
  Expect(recv == send, "the only rank's numbers");
}

void BadArgumentsHaveTheirCodes() {
  const Alone alone;
  float value = 1;
  const auto all_reduce = [&](void* send, HcclDataType type, HcclReduceOp op, HcclComm comm,
                              aclrtStream stream) {
    return HcclAllReduce(send, &value, 1, type, op, comm, stream);
  };
  ExpectCode(HCCL_E_PTR, all_reduce(&value, kFloat, HCCL_REDUCE_SUM, nullptr, nullptr),
             "a null communicator");
  ExpectCode(HCCL_E_PARA, all_reduce(&value, kFloat, HCCL_REDUCE_SUM, &value, nullptr),
             "a stray communicator");
  ExpectCode(HCCL_E_PTR, all_reduce(nullptr, kFloat, HCCL_REDUCE_SUM, alone.comm, nullptr), "a null buffer");
  ExpectCode(HCCL_E_NOT_SUPPORT,
             all_reduce(&value, HCCL_DATA_TYPE_FP64, HCCL_REDUCE_SUM, alone.comm, nullptr),
             "a reduction of fp64");
  ExpectCode(HCCL_E_NOT_SUPPORT,
             all_reduce(&value, HCCL_DATA_TYPE_BFP16, HCCL_REDUCE_PROD, alone.comm, nullptr),
             "a product of bf16");
  ExpectCode(HCCL_E_PARA, all_reduce(&value, kFloat, HCCL_REDUCE_RESERVED, alone.comm, nullptr),
             "no operation");
  ExpectCode(HCCL_E_RUNTIME, all_reduce(&value, kFloat, HCCL_REDUCE_SUM, alone.comm, &value),
             "a stray stream");
  ExpectCode(HCCL_E_PARA, HcclBroadcast(&value, 1, kFloat, 1, alone.comm, nullptr), "a root that is no rank");
  ExpectCode(HCCL_E_PARA, HcclSend(&value, 1, kFloat, 1, alone.comm, nullptr), "a receiver that is no rank");
  ExpectCode(HCCL_E_PARA, HcclGroupEnd(), "a group that was not started");

  HcclResult state = HCCL_E_RESERVED;
  ExpectCode(HCCL_SUCCESS, HcclGetCommAsyncError(alone.comm, &state), "HcclGetCommAsyncError");
  ExpectCode(HCCL_SUCCESS, state, "a communicator that was only refused things");
}

void TheReasonIsKept() {
  const Alone alone;
  float value = 1;
  HcclAllReduce(&value, &value, 1, HCCL_DATA_TYPE_UINT64, HCCL_REDUCE_SUM, alone.comm, nullptr);
  const char* message = aclGetRecentErrMsg();
  Expect(message != nullptr && std::strstr(message, "not reduced on Atlas A2") != nullptr,
         "the reason as message");
}

void BadInitialisationsHaveTheirCodes() {
  HcclComm comm = nullptr;
  HcclRootInfo root_info;
  std::memset(&root_info, 0, sizeof root_info);
  ExpectCode(HCCL_E_PARA, HcclCommInitRootInfo(1, &root_info, 0, &comm), "a root info of zeros");
  HcclGetRootInfo(&root_info);
  ExpectCode(HCCL_E_PARA, HcclCommInitRootInfo(2, &root_info, 2, &comm), "a rank beyond the last");
  ExpectCode(HCCL_E_PARA, HcclCommInitRootInfo(65, &root_info, 0, &comm), "too many ranks");
  ExpectCode(HCCL_E_PTR, HcclCommInitRootInfo(1, &root_info, 0, nullptr), "nowhere to put the communicator");
  HcclCommConfig config;
  std::memset(&config, 0, sizeof config);
  ExpectCode(HCCL_E_PARA, HcclCommInitRootInfoConfig(1, &root_info, 0, &config, &comm),
             "a blank configuration");
  setenv("HCCL_EXEC_TIMEOUT", "soon", 1);
  ExpectCode(HCCL_E_PARA, HcclCommInitRootInfo(1, &root_info, 0, &comm), "a timeout that is no number");
  unsetenv("HCCL_EXEC_TIMEOUT");
}

void ADestroyedCommunicatorIsNoLongerKnown() {
  HcclComm comm = nullptr;
  {
    const Alone alone;
    comm = alone.comm;
  }
  HcclResult state = HCCL_SUCCESS;
  ExpectCode(HCCL_E_PARA, HcclGetCommAsyncError(comm, &state), "a destroyed communicator");
}

void ANameIsKept() {
  HcclRootInfo root_info;
  HcclGetRootInfo(&root_info);
  HcclCommConfig config;
  HcclCommConfigInit(&config);
  std::strcpy(config.hcclCommName, "tensor_parallel");
  HcclComm comm = nullptr;
  ExpectCode(HCCL_SUCCESS, HcclCommInitRootInfoConfig(1, &root_info, 0, &config, &comm),
             "a named communicator");
  char name[COMM_NAME_MAX_LENGTH];
  ExpectCode(HCCL_SUCCESS, HcclGetCommName(comm, name), "HcclGetCommName");
  Expect(std::string(name) == "tensor_parallel", "the given name");
  HcclCommDestroy(comm);
}

void ACallDoesNotWaitForItsStream() {
  const Alone alone;
  Stream& stream = Stream::Create(0);
  Gate gate;
  stream.Enqueue(gate.Task());
  float send = 1, recv = 0;
  HcclAllReduce(&send, &recv, 1, kFloat, HCCL_REDUCE_SUM, alone.comm, stream.handle());
  Expect(recv == 0, "nothing to have happened behind the gate");
  gate.Open();
  stream.Synchronize();
  Expect(recv == 1, "the result once the gate is open");
  Stream::Destroy(stream.handle());
}

void OperationsKeepTheirOrderAcrossStreams() {
  const Alone alone;
  Stream& held = Stream::Create(0);
  Stream& free = Stream::Create(0);
  Gate gate;
  held.Enqueue(gate.Task());
  float first = 1, second = 0, third = 0;
  HcclAllReduce(&first, &second, 1, kFloat, HCCL_REDUCE_SUM, alone.comm, held.handle());
  HcclAllReduce(&second, &third, 1, kFloat, HCCL_REDUCE_SUM, alone.comm, free.handle());
  Expect(!free.SynchronizeFor(std::chrono::milliseconds(50)), "the second operation to wait for the first");
  gate.Open();
  free.Synchronize();
  Expect(third == 1, "the second operation to find the first one's result");
  held.Synchronize();
  Stream::Destroy(held.handle());
  Stream::Destroy(free.handle());
}

void AGroupIsSentWhenItsOutermostBracketCloses() {
  const Alone alone;
  float send = 7, recv = 0;
  HcclGroupStart();
  HcclGroupStart();
  // A rank's message to itself: outside a group, the send and the receive would be two operations.
  HcclRecv(&recv, 1, kFloat, 0, alone.comm, nullptr);
  HcclGroupEnd();
  HcclSend(&send, 1, kFloat, 0, alone.comm, nullptr);
  Stream::From(nullptr).Synchronize();
  Expect(recv == 0, "nothing to be sent inside the group");
  ExpectCode(HCCL_SUCCESS, HcclGroupEnd(), "HcclGroupEnd");
  Stream::From(nullptr).Synchronize();
  Expect(recv == 7, "the message after the group");
}

}  // namespace

int main() {
  aclInit(nullptr);
  aclrtSetDevice(0);
  return RunAll({
      {"one rank reduces to itself", OneRankReducesToItself},
      {"bad arguments have their codes", BadArgumentsHaveTheirCodes},
      {"the reason is kept", TheReasonIsKept},
      {"bad initialisations have their codes", BadInitialisationsHaveTheirCodes},
      {"a destroyed communicator is no longer known", ADestroyedCommunicatorIsNoLongerKnown},
      {"a name is kept", ANameIsKept},
      {"a call does not wait for its stream", ACallDoesNotWaitForItsStream},
      {"operations keep their order across streams", OperationsKeepTheirOrderAcrossStreams},
      {"a group is sent when its outermost bracket closes", AGroupIsSentWhenItsOutermostBracketCloses},
  });
}
