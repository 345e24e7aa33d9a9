// The two tensor-core instructions that correlation.cu is built on, for sm_75 and later.
// The assignment of elements to lanes is that of ldmatrix and mma.m16n8k16 in NVIDIA's PTX manual.
// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace flownet2 {

// Reads four 8 x 8 matrices of halves from shared memory, transposed: lane l names row l % 8 of
// matrix l / 8 (16 bytes, aligned to that), to[m] gets matrix m's elements ((l % 4) * 2, l / 4) and
// ((l % 4) * 2 + 1, l / 4).
__device__ inline void load_transposed(const void* row, uint32_t (&to)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// The same for two matrices; the rows are those of lanes 0 to 15.
__device__ inline void load_transposed(const void* row, uint32_t (&to)[2]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address));
}

// sums (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4, t = lane % 4:
//   a[0]: a(g, 2t), a(g, 2t + 1)    a[1]: row g + 8    a[2]: columns + 8    a[3]: both
//   b[0]: b(2t, g), b(2t + 1, g)    b[1]: rows + 8
//   sums: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    float (&sums)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing has half the depth
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

}  // namespace flownet2
