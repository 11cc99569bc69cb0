// SPDX-License-Identifier: Apache-2.0
//
// What reductions compute, bit for bit. Values of 16-bit floats are written as their bits.
#include "hccl/reduce.h"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "hccl/error.h"

using namespace ascend_emulator::hccl;

namespace {

constexpr uint16_t kNan16 = 0x7e00;

template <typename T>
struct Example {
  std::string sentence;
  HcclDataType type;
  HcclReduceOp op;
  std::vector<T> ranks;
  T expected;
};

template <typename T>
void Check(const Example<T>& example) {
  std::vector<const void*> inputs;
  for (const T& value : example.ranks) inputs.push_back(&value);
  T result{};
  Reduce(example.type, example.op, inputs, 1, &result);
  Expect(result == example.expected, example.sentence);
}

void CheckHalves() {
  const std::vector<Example<uint16_t>> cases = {
      {"fp16: 2048 + 1 + 1 is 2050, because it is rounded once",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_SUM,
       {0x6800, 0x3c00, 0x3c00},
       0x6801},
      {"fp16: 2048 + 1 is 2048: a tie goes to even",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_SUM,
       {0x6800, 0x3c00},
       0x6800},
      {"fp16: 2050 + 1 is 2052: a tie goes to even",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_SUM,
       {0x6801, 0x3c00},
       0x6802},
      {"fp16: twice the largest number is infinity",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_SUM,
       {0x7bff, 0x7bff},
       0x7c00},
      {"fp16: the smallest subnormal, twice", HCCL_DATA_TYPE_FP16, HCCL_REDUCE_SUM, {0x0001, 0x0001}, 0x0002},
      {"fp16: subnormals add up to a normal number",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_SUM,
       {0x0200, 0x0200},
       0x0400},
      {"fp16: 3 * -2 is -6", HCCL_DATA_TYPE_FP16, HCCL_REDUCE_PROD, {0x4200, 0xc000}, 0xc600},
      {"fp16: the larger of -1 and -2", HCCL_DATA_TYPE_FP16, HCCL_REDUCE_MAX, {0xbc00, 0xc000}, 0xbc00},
      {"fp16: the smaller of -1 and -2", HCCL_DATA_TYPE_FP16, HCCL_REDUCE_MIN, {0xbc00, 0xc000}, 0xc000},
      {"fp16: NaN on the last rank is the maximum",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_MAX,
       {0x3c00, kNan16},
       kNan16},
      {"fp16: NaN on the first rank is the minimum",
       HCCL_DATA_TYPE_FP16,
       HCCL_REDUCE_MIN,
       {kNan16, 0x3c00},
       kNan16},
      {"bf16: 1 + three quarters of a step is the next number",
       HCCL_DATA_TYPE_BFP16,
       HCCL_REDUCE_SUM,
       {0x3f80, 0x3b00, 0x3b00, 0x3b00},
       0x3f81},
      {"bf16: 256 + 1 is 256: a tie goes to even",
       HCCL_DATA_TYPE_BFP16,
       HCCL_REDUCE_SUM,
       {0x4380, 0x3f80},
       0x4380},
      {"bf16: 258 + 1 is 260: a tie goes to even",
       HCCL_DATA_TYPE_BFP16,
       HCCL_REDUCE_SUM,
       {0x4381, 0x3f80},
       0x4382},
      {"bf16: 3 * -2 is -6", HCCL_DATA_TYPE_BFP16, HCCL_REDUCE_PROD, {0x4040, 0xc000}, 0xc0c0},
      {"bf16: minus infinity is the smallest",
       HCCL_DATA_TYPE_BFP16,
       HCCL_REDUCE_MIN,
       {0x0000, 0xff80},
       0xff80},
  };
  for (const auto& example : cases) Check(example);
}

void CheckIntegers() {
  Check<int8_t>({"int8: 100 + 100 wraps to -56", HCCL_DATA_TYPE_INT8, HCCL_REDUCE_SUM, {100, 100}, -56});
  Check<int16_t>(
      {"int16: 300 * 300 wraps to 24464", HCCL_DATA_TYPE_INT16, HCCL_REDUCE_PROD, {300, 300}, 24464});
  Check<int32_t>({"int32: -7 is the smallest", HCCL_DATA_TYPE_INT32, HCCL_REDUCE_MIN, {3, -7, 5}, -7});
  Check<int64_t>({"int64: the largest + 1 wraps to the smallest",
                  HCCL_DATA_TYPE_INT64,
                  HCCL_REDUCE_SUM,
                  {std::numeric_limits<int64_t>::max(), 1},
                  std::numeric_limits<int64_t>::min()});
  Check<int64_t>({"int64: 2^53 + 1 keeps every bit",
                  HCCL_DATA_TYPE_INT64,
                  HCCL_REDUCE_MAX,
                  {int64_t{1} << 53, (int64_t{1} << 53) + 1},
                  9007199254740993});
}

void CheckFloats() {
  // 1e8 swallows 1 in fp32, so the order shows in the result.
  Check<float>({"fp32: (1e8 - 1e8) + 1, in the order of ranks",
                HCCL_DATA_TYPE_FP32,
                HCCL_REDUCE_SUM,
                {1e8f, -1e8f, 1.0f},
                1.0f});
  Check<float>({"fp32: (1e8 + 1) - 1e8, in the order of ranks",
                HCCL_DATA_TYPE_FP32,
                HCCL_REDUCE_SUM,
                {1e8f, 1.0f, -1e8f},
                0.0f});
}

/// Every fp16 and bf16 number survives being loaded and stored; a NaN stays a NaN.
void CheckEveryHalf(HcclDataType type, uint16_t infinity) {
  std::vector<uint16_t> all;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) all.push_back(static_cast<uint16_t>(bits));
  std::vector<uint16_t> result(all.size());
  Reduce(type, HCCL_REDUCE_SUM, {all.data()}, all.size(), result.data());
  for (size_t i = 0; i < all.size(); ++i) {
    const bool nan = (all[i] & 0x7fff) > infinity;
    Expect(nan ? (result[i] & 0x7fff) > infinity : result[i] == all[i], "Reduce: a 16-bit number is kept");
  }
}

void CheckLengths() {
  for (const size_t count : {size_t{0}, size_t{1}, size_t{511}, size_t{512}, size_t{513}, size_t{1300}}) {
    std::vector<int32_t> first(count + 1, 3), second(count + 1, 4);
    Reduce(HCCL_DATA_TYPE_INT32, HCCL_REDUCE_SUM, {first.data(), second.data()}, count, first.data());
    for (size_t i = 0; i < count; ++i) Expect(first[i] == 7, "Reduce: in place, every element is summed");
    Expect(first[count] == 3, "Reduce: the element behind the last is left alone");
  }
}

HcclResult CodeOfCheck(HcclDataType type, HcclReduceOp op) {
  try {
    CheckReduction(type, op);
  } catch (const Error& error) {
    return error.code();
  }
  return HCCL_SUCCESS;
}

void CheckRefusals() {
  Expect(CodeOfCheck(HCCL_DATA_TYPE_BFP16, HCCL_REDUCE_SUM) == HCCL_SUCCESS, "CheckReduction: bf16 sums");
  Expect(CodeOfCheck(HCCL_DATA_TYPE_FP64, HCCL_REDUCE_SUM) == HCCL_E_NOT_SUPPORT,
         "CheckReduction: fp64 is refused");
  Expect(CodeOfCheck(HCCL_DATA_TYPE_UINT64, HCCL_REDUCE_MAX) == HCCL_E_NOT_SUPPORT,
         "CheckReduction: uint64 is refused");
  Expect(CodeOfCheck(HCCL_DATA_TYPE_BFP16, HCCL_REDUCE_PROD) == HCCL_E_NOT_SUPPORT,
         "CheckReduction: prod of bf16 is refused");
  Expect(CodeOfCheck(HCCL_DATA_TYPE_FP32, HCCL_REDUCE_RESERVED) == HCCL_E_PARA,
         "CheckReduction: an unknown operation is refused");
  Expect(CodeOfCheck(HCCL_DATA_TYPE_RESERVED, HCCL_REDUCE_SUM) == HCCL_E_PARA,
         "CheckReduction: an unknown type is refused");
}

}  // namespace

int main() {
  return RunAll({
      {"16-bit floats", CheckHalves},
      {"integers", CheckIntegers},
      {"the order of ranks", CheckFloats},
      {"every fp16 number", [] { CheckEveryHalf(HCCL_DATA_TYPE_FP16, 0x7c00); }},
      {"every bf16 number", [] { CheckEveryHalf(HCCL_DATA_TYPE_BFP16, 0x7f80); }},
      {"lengths around the block that is summed at a time", CheckLengths},
      {"what an A2 card does not reduce", CheckRefusals},
  });
}
