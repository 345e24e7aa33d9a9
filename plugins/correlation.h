// FlowNet's correlation of two feature maps: one description of a call, one launcher per processor.
//
// Knows neither TensorRT nor ONNX Runtime; README.md beside this file gives formula and limits.
// Nothing here throws. SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

struct CUstream_st;  // CUDA's cudaStream_t points to it

namespace flownet2 {

struct CorrelationAttributes {
  int32_t pad = 0;
  int32_t kernel_size = 0;
  int32_t max_displacement = 0;
  int32_t stride1 = 0;
  int32_t stride2 = 0;

  // Displacements go from -radius() to radius() steps of stride2, in y and in x.
  int32_t radius() const { return max_displacement / stride2; }
};

// The attributes' names, in the order of the struct. All are required: none has a default.
constexpr const char* kAttributeNames[] = {"pad", "kernel_size", "max_displacement", "stride1",
                                           "stride2"};

// The shape of one input; both inputs have the same.
struct FeatureShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
};

enum class ElementType { kFloat32, kFloat16 };

enum class CorrelationStatus {
  kOk = 0,
  kBadKernelSize,
  kBadPad,
  kBadMaxDisplacement,
  kBadStride1,
  kBadStride2,
  kBadShape,
  kInputTooSmall,
  kTooLarge,
  kLaunchFailed,
};

// A sentence that says what to change; never null, and never freed.
const char* correlation_message(CorrelationStatus status);

// Sets the attribute of that name; false if there is none. A value past 32 bits becomes one that
// check_attributes refuses.
bool set_attribute(CorrelationAttributes* attributes, const char* name, int64_t value);

CorrelationStatus check_attributes(const CorrelationAttributes& attributes);

// The output's shape for inputs of shape `input` (the batch size is kept). Returns kOk, or the error
// of the call.
CorrelationStatus output_shape(const CorrelationAttributes& attributes, const FeatureShape& input,
                               FeatureShape* output);

// CUDA: a, b and out are device pointers, dense NCHW, of the current device, 16-byte aligned (as
// every allocator gives them). Asynchronous on `stream`; needs no workspace.
CorrelationStatus correlation_cuda(const CorrelationAttributes& attributes,
                                   const FeatureShape& input, ElementType type, const void* a,
                                   const void* b, void* out, CUstream_st* stream);

// CPU: plain loops, for tests.
CorrelationStatus correlation_cpu(const CorrelationAttributes& attributes,
                                  const FeatureShape& input, const float* a, const float* b,
                                  float* out);

}  // namespace flownet2
