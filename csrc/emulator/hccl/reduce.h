// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of reductions: types, their sizes, and the combination of the same elements of several
// ranks.
//
// The order is always that of the ranks, 0 first, whichever rank computes, so every rank gets the same bits
// and a run repeats. fp16 and bf16 are accumulated in fp32 and rounded once, to nearest even; a card that
// rounds after every step may differ in the last bit. Integers wrap. For max and min a NaN of any rank is the
// result.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "third_party/hccl/inc/hccl/hccl_types.h"

namespace ascend_emulator::hccl {

/// What a reader calls the type: "fp64"; "data type 99" for a value that HCCL does not have.
std::string NameOf(HcclDataType type);

/// Bytes of one element. Throws Error(HCCL_E_PARA) for a value that is not an element type of HCCL.
size_t ElementBytes(HcclDataType type);

/// Throws Error unless an Atlas A2 card reduces `type` with `op`: int8, int16, int32, int64, fp16, fp32 and
/// bf16 with sum, max and min; prod for all of these but int16 and bf16 (CANN's page on HcclAllReduce).
/// HCCL_E_NOT_SUPPORT for what other cards may do, HCCL_E_PARA for what is no reduction at all.
void CheckReduction(HcclDataType type, HcclReduceOp op);

/// output[i] = inputs[0][i] op inputs[1][i] op ..., for `count` elements of `type`. There is at least one
/// input. `output` may be one of the inputs. Computes every op on every type that CheckReduction knows, prod
/// on int16 and bf16 included.
void Reduce(HcclDataType type, HcclReduceOp op, const std::vector<const void*>& inputs, size_t count,
            void* output);

}  // namespace ascend_emulator::hccl
