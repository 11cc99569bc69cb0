// SPDX-License-Identifier: Apache-2.0
//
// An NPU generator is a seed and an offset. An operator on the emulated device needs a CPU generator, whose
// state is of another kind; so each operator gets a fresh one, seeded by that pair, and the offset moves on.
// All that a user can do with an NPU generator (seed it, save its state, restore it) then means what it means
// on a card. The numbers themselves differ from a card's.
#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/util/Exception.h>

#include <mutex>

#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"

namespace ascend_emulator::aten {
namespace {

// What one operator takes from an NPU generator; the generator counts in fours.
constexpr uint64_t kOffsetPerOperator = 4;

// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
// 2014).
uint64_t Mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
  return bits ^ (bits >> 31);
}

}  // namespace

at::Generator DrawHostGenerator(const std::optional<at::Generator>& generator) {
  const bool given = generator.has_value() && generator->defined();
  TORCH_CHECK(!given || generator->device().type() == c10::DeviceType::PrivateUse1,
              "Expected a 'npu' device type for generator but found '", generator->device().type(), "'");
  at::Generator source = given ? *generator : at_npu::detail::getDefaultNPUGenerator();
  std::pair<uint64_t, uint64_t> state;
  {
    std::lock_guard<std::mutex> lock(source.mutex());
    state = source.get<at_npu::NPUGeneratorImpl>()->philox_engine_inputs(kOffsetPerOperator);
  }
  return at::make_generator<at::CPUGeneratorImpl>(Mix(Mix(state.first) + state.second));
}

}  // namespace ascend_emulator::aten
