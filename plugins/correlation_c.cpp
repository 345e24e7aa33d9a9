// correlation_cuda with a C name, to be loaded with ctypes by benchmarks/correlation.py and the
// tests. Not part of the plugins. SPDX-License-Identifier: GPL-3.0-or-later
#include "correlation.h"

// attributes: pad, kernel_size, max_displacement, stride1, stride2. shape: N, C, H, W.
// Returns null, or an error message.
extern "C" __attribute__((visibility("default"))) const char* flownet2_correlation_cuda(
    const int32_t* attributes, const int64_t* shape, int half, const void* a, const void* b,
    void* out, CUstream_st* stream) {
  const flownet2::CorrelationStatus status = flownet2::correlation_cuda(
      {attributes[0], attributes[1], attributes[2], attributes[3], attributes[4]},
      {shape[0], shape[1], shape[2], shape[3]},
      half ? flownet2::ElementType::kFloat16 : flownet2::ElementType::kFloat32, a, b, out, stream);
  return status == flownet2::CorrelationStatus::kOk ? nullptr
                                                    : flownet2::correlation_message(status);
}
