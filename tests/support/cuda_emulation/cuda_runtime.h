// As much of CUDA as plugins/correlation.cu uses, on one CPU thread: each CUDA thread is a fiber
// that runs until it meets a barrier. Compiled with this folder in front, the .cu file is C++.
//
// It is stricter than a GPU where that shows mistakes: each warp runs as far as it can before the
// next, and in odd blocks in reverse order (a missing barrier reads stale data); a barrier that not
// all threads reach, or a pointer that a matrix instruction would refuse, fails the launch. It says
// nothing about speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

namespace emulation {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  enum State { kReady, kAtWarp, kAtBlock, kDone } state = kReady;
  ucontext_t context;
  std::vector<char> stack;
  // What the thread shows the others of its warp.
  const void* row = nullptr;
  uint32_t a[4] = {}, b[2] = {};
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current;
inline bool failed;
inline std::function<void()> body;

inline void fail(const char* reason) {
  if (!failed) std::fprintf(stderr, "CUDA emulation: %s\n", reason);
  failed = true;
}

inline void require_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned pointer");
}

inline void wait(Fiber::State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

// Whether all of the threads from `first` on, `count` of them, are in a state.
inline bool all(size_t first, size_t count, Fiber::State state) {
  for (size_t i = first; i < first + count; ++i)
    if (fibers[i].state != state) return false;
  return true;
}

inline void let_go(size_t first, size_t count) {
  for (size_t i = first; i < first + count; ++i) fibers[i].state = Fiber::kReady;
}

}  // namespace emulation

struct Index {
  unsigned x;
};
inline Index blockIdx;
struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(emulation::current); }
  } x;
};
inline ThreadIndex threadIdx;

namespace emulation {

// Runs a warp until the whole block has to wait: as far ahead of the other warps as a GPU may.
inline void run_warp(size_t first, bool reverse) {
  for (;;) {
    for (size_t i = 0; i < kWarp; ++i) {
      current = first + (reverse ? kWarp - 1 - i : i);
      if (fibers[current].state == Fiber::kReady)
        swapcontext(&scheduler, &fibers[current].context);
    }
    if (!all(first, kWarp, Fiber::kAtWarp)) return;
    let_go(first, kWarp);
  }
}

inline void run_block(unsigned block, size_t threads) {
  blockIdx.x = block;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.state = Fiber::kReady;
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(
        &fiber.context,
        [] {
          body();
          fibers[current].state = Fiber::kDone;
        },
        0);
  }
  while (!failed && !all(0, threads, Fiber::kDone)) {
    for (size_t i = 0; i < threads / kWarp; ++i)
      run_warp((block % 2 ? threads / kWarp - 1 - i : i) * kWarp, block % 2);
    if (all(0, threads, Fiber::kAtBlock))
      let_go(0, threads);
    else if (!all(0, threads, Fiber::kDone))
      fail("a barrier that not all threads reach");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Fiber::kAtBlock); }

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulation::failed = config->gridDim.x == 0 || config->blockDim.x % emulation::kWarp != 0;
  emulation::body = [=] { kernel(arguments...); };
  for (unsigned block = 0; block < config->gridDim.x && !emulation::failed; ++block)
    emulation::run_block(block, config->blockDim.x);
  return emulation::failed ? cudaErrorLaunchFailure : cudaSuccess;
}
