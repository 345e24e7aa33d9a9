// Matrix fragments that lane 0 of a warp holds whole and computes alone.
#pragma once

#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float at[16][16];
};

inline bool lane0() { return emulation::current % emulation::kWarp == 0; }

template <class Fragment>
void fill_fragment(Fragment& fragment, float value) {
  for (auto& row : fragment.at)
    for (float& element : row) element = value;
}

inline void check(const void* pointer, unsigned bytes) {
  emulation::require_aligned(pointer, 32);
  if (bytes % 16 != 0) emulation::fail("leading dimension of a matrix is not 16-byte steps");
}

template <class Use>
void load_matrix_sync(fragment<Use, 16, 16, 16, __half, row_major>& to, const __half* from,
                      unsigned pitch) {
  check(from, pitch * sizeof(__half));
  if (!lane0()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to.at[i][j] = __half2float(from[i * pitch + j]);
}

template <class Use>
void load_matrix_sync(fragment<Use, 16, 16, 16, __half, col_major>& to, const __half* from,
                      unsigned pitch) {
  check(from, pitch * sizeof(__half));
  if (!lane0()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to.at[i][j] = __half2float(from[j * pitch + i]);
}

template <class A, class B, class C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  if (!lane0()) return;
  C sum = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sum.at[i][j] += a.at[i][k] * b.at[k][j];
  d = sum;
}

template <class C>
void store_matrix_sync(float* to, const C& from, unsigned pitch, layout_t) {
  check(to, pitch * sizeof(float));
  if (!lane0()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * pitch + j] = from.at[i][j];
}

}  // namespace nvcuda::wmma
