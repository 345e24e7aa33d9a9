// plugins/tensor_core.cuh on fibers: lanes show each other what they hold, and each computes its
// own elements of the result, straight from the layouts in NVIDIA's PTX manual.
#pragma once

#include "cuda_fp16.h"

namespace flownet2 {

inline float half_of(uint32_t two, int index) {
  const uint16_t bits = static_cast<uint16_t>(two >> 16 * index);
  __half half;
  std::memcpy(&half, &bits, sizeof(half));
  return __half2float(half);
}

template <size_t kMatrices>
void load_transposed(const void* row, uint32_t (&to)[kMatrices]) {
  const size_t lane = emulation::current % emulation::kWarp;
  const size_t warp = emulation::current - lane;
  if (lane < 8 * kMatrices) emulation::require_aligned(row, 16);
  emulation::fibers[emulation::current].row = row;
  emulation::wait(emulation::Fiber::kAtWarp);
  for (size_t m = 0; m < kMatrices; ++m) {
    to[m] = 0;
    for (size_t i = 0; i < 2; ++i) {
      uint16_t element;
      const void* from = emulation::fibers[warp + 8 * m + lane % 4 * 2 + i].row;
      std::memcpy(&element, static_cast<const char*>(from) + lane / 4 * sizeof(element),
                  sizeof(element));
      to[m] |= static_cast<uint32_t>(element) << 16 * i;
    }
  }
  emulation::wait(emulation::Fiber::kAtWarp);
}

inline void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4]) {
  const size_t lane = emulation::current % emulation::kWarp;
  const size_t warp = emulation::current - lane;
  emulation::Fiber& own = emulation::fibers[emulation::current];
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  emulation::wait(emulation::Fiber::kAtWarp);
  for (size_t e = 0; e < 4; ++e) {
    const size_t row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (size_t k = 0; k < 16; ++k) {
      const auto& holds_a = emulation::fibers[warp + row % 8 * 4 + k % 8 / 2].a;
      const auto& holds_b = emulation::fibers[warp + column * 4 + k % 8 / 2].b;
      sums[e] += half_of(holds_a[row / 8 + k / 8 * 2], k % 2) * half_of(holds_b[k / 8], k % 2);
    }
  }
  emulation::wait(emulation::Fiber::kAtWarp);
}

}  // namespace flownet2
