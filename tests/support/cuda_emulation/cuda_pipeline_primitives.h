// Asynchronous copies that land when they are waited for; from the start until then their target
// holds NaN, so that neither an early nor a late reader sees what it wants.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  emulation::require_aligned(to, size);
  emulation::require_aligned(from, size);
  std::memset(to, 0xff, size);
  emulation::fibers[emulation::current].copies.back().push_back({to, from, size, zeros});
}

inline void __pipeline_commit() {
  emulation::fibers[emulation::current].copies.emplace_back();
}

inline void __pipeline_wait_prior(size_t pending) {
  auto& groups = emulation::fibers[emulation::current].copies;
  while (groups.size() - 1 > pending) {
    for (const emulation::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.size - copy.zeros);
    }
    groups.erase(groups.begin());
  }
}
