// SPDX-License-Identifier: Apache-2.0
//
// libacl_op_compiler: options of the operator compiler. There is no compiler, so an option changes nothing
// but what aclGetCompileopt answers; compiling an operator is refused (unsupported/symbols.txt).
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

std::mutex options_mutex;

std::map<aclCompileOpt, std::string>& Options() {
  static auto& options = *new std::map<aclCompileOpt, std::string>{{ACL_PRECISION_MODE, "allow_fp32_to_fp16"},
                                                                   {ACL_OP_JIT_COMPILE, "disable"}};
  return options;
}

}  // namespace

extern "C" {

// Kept to be read back; there is no compiler that it could change.
aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
  if (value == nullptr) return ACL_ERROR_INVALID_PARAM;
  std::lock_guard lock(options_mutex);
  Options()[option] = value;
  return ACL_SUCCESS;
}

// Bytes that aclGetCompileopt needs, the final zero included.
size_t aclGetCompileoptSize(aclCompileOpt option) {
  std::lock_guard lock(options_mutex);
  return Options()[option].size() + 1;
}

aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t length) {
  std::lock_guard lock(options_mutex);
  const std::string& found = Options()[option];
  if (value == nullptr || length < found.size() + 1) return ACL_ERROR_INVALID_PARAM;
  std::memcpy(value, found.c_str(), found.size() + 1);
  return ACL_SUCCESS;
}

}  // extern "C"
