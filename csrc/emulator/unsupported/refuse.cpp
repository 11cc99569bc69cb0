// SPDX-License-Identifier: Apache-2.0
#include "unsupported/refuse.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "acl/error.h"

namespace ascend_emulator {
namespace {

std::string Readable(const char* symbol) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(symbol, nullptr, nullptr, &status), &std::free);
  return status == 0 ? name.get() : symbol;
}

}  // namespace

int Refuse(const char* symbol) {
  const std::string sentence = Readable(symbol) + " is not emulated; see docs/emulator.md";
  std::fprintf(stderr, "ascend emulator: %s\n", sentence.c_str());
  return Report(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, sentence);
}

void RefuseAndAbort(const char* symbol) {
  Refuse(symbol);
  std::abort();
}

}  // namespace ascend_emulator
