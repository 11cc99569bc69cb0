// SPDX-License-Identifier: Apache-2.0
//
// libhcomm: where CANN has the calls that bracket a group of sends and receives.
#include "hccl/launch.h"

using namespace ascend_emulator::hccl;

extern "C" {

HcclResult HcclGroupStart() {
  return Guarded("HcclGroupStart", [] { StartGroup(); });
}

HcclResult HcclGroupEnd() {
  return Guarded("HcclGroupEnd", [] { EndGroup(); });
}

}  // extern "C"
