// SPDX-License-Identifier: Apache-2.0
//
// Reductions, one template over how an element is loaded, combined and stored. See reduce.h for what they
// promise.
#include "hccl/reduce.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "hccl/error.h"

namespace ascend_emulator::hccl {
namespace {

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// A type whose sums are computed in the type itself.
template <typename T>
struct Plain {
  using Stored = T;
  using Computed = T;
  static Computed Load(Stored value) { return value; }
  static Stored Store(Computed value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  using Computed = float;

  static float Load(uint16_t half) { return FloatOf(uint32_t{half} << 16); }

  static uint16_t Store(float value) {
    if (std::isnan(value)) return 0x7fc0;
    const uint32_t bits = BitsOf(value);
    const uint32_t to_nearest_even = 0x7fff + ((bits >> 16) & 1);
    return static_cast<uint16_t>((bits + to_nearest_even) >> 16);
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Computed = float;

  static float Load(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00) return FloatOf(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
    // 2^112 moves fp16's exponent to fp32's; the product is exact, for subnormals too.
    const float scaled = FloatOf(magnitude << 13) * FloatOf((127u + 112u) << 23);
    return FloatOf(sign | BitsOf(scaled));
  }

  static uint16_t Store(float value) {
    const uint32_t bits = BitsOf(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const float magnitude = FloatOf(bits & 0x7fffffff);
    if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    return static_cast<uint16_t>(sign | RoundFinite(magnitude));
  }

 private:
  static uint16_t RoundFinite(float magnitude) {
    constexpr float kSmallestNormal = 6.103515625e-05f;  // 2^-14
    if (magnitude < kSmallestNormal) {
      // Subnormals are multiples of 2^-24: scaling makes them integers, and nearbyint rounds to nearest even.
      return static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
    }
    const uint32_t bits = BitsOf(magnitude);
    const uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1);
    return static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
  }
};

/// Integers are combined as unsigned, because signed overflow is undefined in C++ and wraps on the card.
template <typename T, typename Combine>
T Wrapping(T left, T right, Combine combine) {
  if constexpr (std::is_integral_v<T>) {
    // 64 bits are wide enough that no promotion to a signed type can overflow.
    return static_cast<T>(combine(static_cast<uint64_t>(left), static_cast<uint64_t>(right)));
  } else {
    return combine(left, right);
  }
}

struct Sum {
  template <typename T>
  static T Combine(T left, T right) {
    return Wrapping(left, right, [](auto a, auto b) { return a + b; });
  }
};

struct Product {
  template <typename T>
  static T Combine(T left, T right) {
    return Wrapping(left, right, [](auto a, auto b) { return a * b; });
  }
};

struct Largest {
  template <typename T>
  static T Combine(T left, T right) {
    if (left != left) return left;
    return left >= right ? left : right;
  }
};

struct Smallest {
  template <typename T>
  static T Combine(T left, T right) {
    if (left != left) return left;
    return left <= right ? left : right;
  }
};

template <typename Element>
typename Element::Computed LoadAt(const void* data, size_t index) {
  typename Element::Stored value;
  std::memcpy(&value, static_cast<const std::byte*>(data) + index * sizeof value, sizeof value);
  return Element::Load(value);
}

template <typename Element>
void StoreAt(void* data, size_t index, typename Element::Computed result) {
  const typename Element::Stored value = Element::Store(result);
  std::memcpy(static_cast<std::byte*>(data) + index * sizeof value, &value, sizeof value);
}

template <typename Element, typename Op>
void ReduceElements(const std::vector<const void*>& inputs, size_t count, void* output) {
  constexpr size_t kBlock = 512;
  std::array<typename Element::Computed, kBlock> totals;
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t size = std::min(kBlock, count - start);
    for (size_t i = 0; i < size; ++i) totals[i] = LoadAt<Element>(inputs[0], start + i);
    for (size_t rank = 1; rank < inputs.size(); ++rank) {
      for (size_t i = 0; i < size; ++i) {
        totals[i] = Op::Combine(totals[i], LoadAt<Element>(inputs[rank], start + i));
      }
    }
    for (size_t i = 0; i < size; ++i) StoreAt<Element>(output, start + i, totals[i]);
  }
}

template <typename Element>
void ReduceWith(HcclReduceOp op, const std::vector<const void*>& inputs, size_t count, void* output) {
  switch (op) {
    case HCCL_REDUCE_SUM:
      return ReduceElements<Element, Sum>(inputs, count, output);
    case HCCL_REDUCE_PROD:
      return ReduceElements<Element, Product>(inputs, count, output);
    case HCCL_REDUCE_MAX:
      return ReduceElements<Element, Largest>(inputs, count, output);
    case HCCL_REDUCE_MIN:
      return ReduceElements<Element, Smallest>(inputs, count, output);
    default:
      throw Error(HCCL_E_PARA, "reduce operation " + std::to_string(op) + " does not exist; use 0 to 3");
  }
}

bool Reducible(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_FP32:
    case HCCL_DATA_TYPE_BFP16:
      return true;
    default:
      return false;
  }
}

}  // namespace

std::string NameOf(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return "int8";
    case HCCL_DATA_TYPE_INT16:
      return "int16";
    case HCCL_DATA_TYPE_INT32:
      return "int32";
    case HCCL_DATA_TYPE_FP16:
      return "fp16";
    case HCCL_DATA_TYPE_FP32:
      return "fp32";
    case HCCL_DATA_TYPE_INT64:
      return "int64";
    case HCCL_DATA_TYPE_UINT64:
      return "uint64";
    case HCCL_DATA_TYPE_UINT8:
      return "uint8";
    case HCCL_DATA_TYPE_UINT16:
      return "uint16";
    case HCCL_DATA_TYPE_UINT32:
      return "uint32";
    case HCCL_DATA_TYPE_FP64:
      return "fp64";
    case HCCL_DATA_TYPE_BFP16:
      return "bf16";
    default:
      return "data type " + std::to_string(type);
  }
}

size_t ElementBytes(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0:
      return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    default:
      throw Error(HCCL_E_PARA, NameOf(type) + " does not exist; see HcclDataType");
  }
}

void CheckReduction(HcclDataType type, HcclReduceOp op) {
  ElementBytes(type);
  if (op < HCCL_REDUCE_SUM || op > HCCL_REDUCE_MIN) {
    throw Error(HCCL_E_PARA, "reduce operation " + std::to_string(op) + " does not exist; use 0 to 3");
  }
  if (!Reducible(type)) {
    throw Error(
        HCCL_E_NOT_SUPPORT,
        NameOf(type) + " is not reduced on Atlas A2; use int8, int16, int32, int64, fp16, fp32 or bf16");
  }
  if (op == HCCL_REDUCE_PROD && (type == HCCL_DATA_TYPE_INT16 || type == HCCL_DATA_TYPE_BFP16)) {
    throw Error(HCCL_E_NOT_SUPPORT, "prod of int16 or bf16 is not there on Atlas A2; cast to int32 or fp32");
  }
}

void Reduce(HcclDataType type, HcclReduceOp op, const std::vector<const void*>& inputs, size_t count,
            void* output) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return ReduceWith<Plain<int8_t>>(op, inputs, count, output);
    case HCCL_DATA_TYPE_INT16:
      return ReduceWith<Plain<int16_t>>(op, inputs, count, output);
    case HCCL_DATA_TYPE_INT32:
      return ReduceWith<Plain<int32_t>>(op, inputs, count, output);
    case HCCL_DATA_TYPE_INT64:
      return ReduceWith<Plain<int64_t>>(op, inputs, count, output);
    case HCCL_DATA_TYPE_FP16:
      return ReduceWith<Float16>(op, inputs, count, output);
    case HCCL_DATA_TYPE_FP32:
      return ReduceWith<Plain<float>>(op, inputs, count, output);
    case HCCL_DATA_TYPE_BFP16:
      return ReduceWith<BFloat16>(op, inputs, count, output);
    default:
      throw Error(HCCL_E_NOT_SUPPORT, NameOf(type) + " has no reduction");
  }
}

}  // namespace ascend_emulator::hccl
