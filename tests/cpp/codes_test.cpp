// SPDX-License-Identifier: Apache-2.0
//
// libascendcl's entry points: each mistake gets the code that CANN gives for it, and a sentence.
#include <acl/acl.h>

#include <cstdlib>
#include <cstring>
#include <future>
#include <string>
#include <thread>

#include "check.h"

namespace {

constexpr std::size_t kBudget = std::size_t{1} << 20;

void ExpectCode(aclError expected, const std::string& call, aclError found) {
  Expect(found == expected,
         call + " to give " + std::to_string(expected) + " and not " + std::to_string(found));
}

void WithoutADeviceThereIsNoContext() {
  std::thread([] {
    int32_t device = -1;
    aclrtContext context = nullptr;
    void* memory = nullptr;
    aclrtStream stream = nullptr;
    ExpectCode(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetDevice", aclrtGetDevice(&device));
    ExpectCode(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetCurrentContext", aclrtGetCurrentContext(&context));
    ExpectCode(ACL_ERROR_RT_CONTEXT_NULL, "aclrtMalloc", aclrtMalloc(&memory, 1, ACL_MEM_MALLOC_HUGE_FIRST));
    ExpectCode(ACL_ERROR_RT_CONTEXT_NULL, "aclrtCreateStream", aclrtCreateStream(&stream));
  }).join();
}

void DevicesAreChecked() {
  ExpectCode(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtSetDevice(2)", aclrtSetDevice(2));
  ExpectCode(ACL_SUCCESS, "aclrtSetDevice(1)", aclrtSetDevice(1));
  aclrtContext of_one = nullptr;
  ExpectCode(ACL_SUCCESS, "aclrtGetCurrentContext", aclrtGetCurrentContext(&of_one));
  ExpectCode(ACL_SUCCESS, "aclrtSetDevice(0)", aclrtSetDevice(0));
  ExpectCode(ACL_SUCCESS, "aclrtSetCurrentContext", aclrtSetCurrentContext(of_one));
  int32_t device = -1;
  aclrtGetDevice(&device);
  Expect(device == 1, "the context of device 1 to bring device 1 back");
  int not_a_context = 0;
  ExpectCode(ACL_ERROR_RT_INVALID_HANDLE, "aclrtSetCurrentContext", aclrtSetCurrentContext(&not_a_context));
  aclrtSetDevice(0);
}

void OutOfMemoryHasItsOwnCodeAndASentence() {
  void* memory = nullptr;
  ExpectCode(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMalloc over the budget",
             aclrtMalloc(&memory, kBudget + 1, ACL_MEM_MALLOC_HUGE_FIRST));
  ExpectCode(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtPeekAtLastError",
             aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL));
  const char* sentence = aclGetRecentErrMsg();
  Expect(sentence != nullptr && std::strstr(sentence, "1048577 bytes") != nullptr,
         "the sentence to name the size");
  Expect(aclGetRecentErrMsg() == nullptr, "the sentence to be handed out once");
  ExpectCode(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtGetLastError", aclrtGetLastError(ACL_RT_THREAD_LEVEL));
  ExpectCode(ACL_SUCCESS, "aclrtGetLastError again", aclrtGetLastError(ACL_RT_THREAD_LEVEL));
}

void CopiesAreChecked() {
  void* device = nullptr;
  ExpectCode(ACL_SUCCESS, "aclrtMalloc", aclrtMalloc(&device, 4096, ACL_MEM_MALLOC_HUGE_FIRST));
  char host[8192] = {};
  ExpectCode(ACL_ERROR_RT_PARAM_INVALID, "a copy longer than its destination",
             aclrtMemcpy(device, 10, host, 11, ACL_MEMCPY_HOST_TO_DEVICE));
  ExpectCode(ACL_ERROR_RT_PARAM_INVALID, "a copy behind the allocation",
             aclrtMemcpy(device, sizeof(host), host, 4097, ACL_MEMCPY_HOST_TO_DEVICE));
  ExpectCode(ACL_ERROR_RT_PARAM_INVALID, "a host address called device memory",
             aclrtMemcpy(host, 16, host + 16, 16, ACL_MEMCPY_HOST_TO_DEVICE));
  ExpectCode(ACL_ERROR_RT_PARAM_INVALID, "a device address called host memory",
             aclrtMemcpy(device, 16, device, 16, ACL_MEMCPY_HOST_TO_DEVICE));
  ExpectCode(ACL_SUCCESS, "a right copy", aclrtMemcpy(device, 4096, host, 4096, ACL_MEMCPY_HOST_TO_DEVICE));
  host[0] = 1;
  ExpectCode(ACL_SUCCESS, "a copy of unnamed kind",
             aclrtMemcpy(host, 4096, device, 4096, ACL_MEMCPY_DEFAULT));
  Expect(host[0] == 0, "the copy of unnamed kind to find its direction");
  ExpectCode(ACL_SUCCESS, "aclrtFree", aclrtFree(device));
  ExpectCode(ACL_ERROR_RT_MEMORY_FREE, "a second aclrtFree", aclrtFree(device));
}

void HandlesAreChecked() {
  int not_a_handle = 0;
  aclrtStreamStatus stream_status;
  aclrtEventRecordedStatus event_status;
  ExpectCode(ACL_ERROR_RT_INVALID_HANDLE, "aclrtStreamQuery",
             aclrtStreamQuery(&not_a_handle, &stream_status));
  ExpectCode(ACL_ERROR_RT_INVALID_HANDLE, "aclrtQueryEventStatus",
             aclrtQueryEventStatus(&not_a_handle, &event_status));
  ExpectCode(ACL_ERROR_RT_PARAM_INVALID, "aclrtStreamQuery without a result",
             aclrtStreamQuery(nullptr, nullptr));
}

void AHeldStreamTimesOut() {
  aclrtStream stream = nullptr;
  ExpectCode(ACL_SUCCESS, "aclrtCreateStream", aclrtCreateStream(&stream));
  std::promise<void> gate;
  const auto wait = [](void* argument) { static_cast<std::promise<void>*>(argument)->get_future().wait(); };
  ExpectCode(ACL_SUCCESS, "aclrtLaunchHostFunc", aclrtLaunchHostFunc(stream, wait, &gate));
  ExpectCode(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "a wait of 10 ms",
             aclrtSynchronizeStreamWithTimeout(stream, 10));
  ExpectCode(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "a wait for the device",
             aclrtSynchronizeDeviceWithTimeout(10));
  gate.set_value();
  ExpectCode(ACL_SUCCESS, "a wait without end", aclrtSynchronizeStreamWithTimeout(stream, -1));
  ExpectCode(ACL_SUCCESS, "aclrtDestroyStream", aclrtDestroyStream(stream));
}

void WhatIsNotEmulatedIsRefused() {
  aclrtStream stream = nullptr;
  aclrtEvent event = nullptr;
  void* address = nullptr;
  ExpectCode(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "a persistent stream",
             aclrtCreateStreamWithConfig(&stream, 0, ACL_STREAM_PERSISTENT));
  ExpectCode(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "an event across processes",
             aclrtCreateEventExWithFlag(&event, ACL_EVENT_IPC));
  ExpectCode(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "virtual memory",
             aclrtReserveMemAddress(&address, 4096, 0, nullptr, 0));
  const char* sentence = aclGetRecentErrMsg();
  Expect(sentence != nullptr && std::strstr(sentence, "aclrtReserveMemAddress") != nullptr,
         "the sentence to name the call");
}

void InitAndFinalizeComeInPairs() {
  ExpectCode(ACL_ERROR_UNINITIALIZE, "aclFinalize before aclInit", aclFinalize());
  ExpectCode(ACL_SUCCESS, "aclInit without torch", aclInit(nullptr));
  ExpectCode(ACL_ERROR_REPEAT_INITIALIZE, "aclInit again", aclInit(nullptr));
  ExpectCode(ACL_SUCCESS, "aclFinalize", aclFinalize());
}

}  // namespace

int main() {
  setenv("ASCEND_EMULATOR_DEVICES", "2", 1);
  setenv("ASCEND_EMULATOR_MEMORY", std::to_string(kBudget).c_str(), 1);
  unsetenv("ASCEND_RT_VISIBLE_DEVICES");
  return RunAll({
      {"init and finalize come in pairs", InitAndFinalizeComeInPairs},
      {"without a device there is no context", WithoutADeviceThereIsNoContext},
      {"devices are checked", DevicesAreChecked},
      {"out of memory has its own code and a sentence", OutOfMemoryHasItsOwnCodeAndASentence},
      {"copies are checked", CopiesAreChecked},
      {"handles are checked", HandlesAreChecked},
      {"a held stream times out", AHeldStreamTimesOut},
      {"what is not emulated is refused", WhatIsNotEmulatedIsRefused},
  });
}
