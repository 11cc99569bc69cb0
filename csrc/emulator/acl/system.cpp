// SPDX-License-Identifier: Apache-2.0
//
// Calls about CANN as a whole: start and end, versions, log, and what the emulated CANN can do.
#include <acl/acl.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <string>

#include "acl/error.h"
#include "runtime/config.h"

namespace {

using ascend_emulator::Config;
using ascend_emulator::Error;
using ascend_emulator::Fault;
using ascend_emulator::Guarded;
using ascend_emulator::Report;
using ascend_emulator::RequireNonNull;

// torch_npu enables features by version. This is the CANN release whose calls the emulator follows.
constexpr char kCannVersion[] = "8.5.0";
constexpr char kKernelLibrary[] = "libascend_emulator_kernels.so";

std::mutex init_mutex;
bool initialized = false;

std::filesystem::path OwnDirectory() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&OwnDirectory), &info);
  return std::filesystem::canonical(info.dli_fname).parent_path();
}

// The operators are a library of their own, since they link torch and torch_npu, which link this one. They
// are loaded only into a process that has torch_npu: a program that uses the runtime alone has no operators.
void LoadKernels() {
  if (dlopen("libtorch_npu.so", RTLD_LAZY | RTLD_NOLOAD) == nullptr) return;
  const std::string path = OwnDirectory() / kKernelLibrary;
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw Error(Fault::kBadConfiguration,
                std::string("the operators cannot be loaded (") + dlerror() + "); build csrc again");
  }
}

}  // namespace

extern "C" {

// Loads the operators into a process that has torch_npu. The configuration file sets only dumps and
// profiling.
aclError aclInit(const char*) {
  std::lock_guard lock(init_mutex);
  if (initialized) return Report(ACL_ERROR_REPEAT_INITIALIZE, "aclInit was called twice");
  const aclError code = Guarded([] {
    Config::Get();
    LoadKernels();
  });
  initialized = code == ACL_SUCCESS;
  if (code != ACL_SUCCESS) std::fprintf(stderr, "%s\n", aclGetRecentErrMsg());
  return code;
}

// Devices stay usable: torch_npu's threads still call while the process exits.
aclError aclFinalize() {
  std::lock_guard lock(init_mutex);
  if (!initialized) return Report(ACL_ERROR_UNINITIALIZE, "aclFinalize was called before aclInit");
  initialized = false;
  return ACL_SUCCESS;
}

// 8.5.0 for every package.
aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  return Guarded([&] {
    RequireNonNull("aclsysGetCANNVersion", version);
    *version = {};
    std::strcpy(version->version, kCannVersion);
    std::strcpy(version->majorVersion, "8");
    std::strcpy(version->minorVersion, "5");
    std::strcpy(version->releaseVersion, "0");
  });
}

aclError aclsysGetVersionStr(char*, char* version) {
  return Guarded([&] {
    RequireNonNull("aclsysGetVersionStr", version);
    std::strcpy(version, kCannVersion);
  });
}

// Prints errors on standard error and drops the rest.
void aclAppLog(aclLogLevel level, const char* function, const char* file, uint32_t line, const char* format,
               ...) {
  if (level < ACL_ERROR) return;
  std::fprintf(stderr, "%s:%u %s: ", file, line, function);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  return Guarded([&] {
    RequireNonNull("aclGetCannAttributeList", list, count);
    static constexpr aclCannAttr kAttributes[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16};
    *list = kAttributes;
    *count = std::size(kAttributes);
  });
}

// Arithmetic is IEEE and knows bf16; there is no just-in-time compiler.
aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  return Guarded([&] {
    RequireNonNull("aclGetCannAttribute", value);
    *value = attribute == ACL_CANN_ATTR_INF_NAN || attribute == ACL_CANN_ATTR_BF16;
  });
}

}  // extern "C"
