// Checks of a call of the op, shared by all kernels and wrappers.
// SPDX-License-Identifier: GPL-3.0-or-later
#include "correlation.h"

#include <cstring>
#include <initializer_list>
#include <limits>

namespace flownet2 {

namespace {

// Larger attributes and sizes do not occur in practice; up to this limit, no sum or
// product of a few of them overflows an int64.
constexpr int32_t kLargestAttribute = 1 << 14;
constexpr int64_t kLargestSize = 1 << 20;

bool within(int32_t value, int32_t low) { return value >= low && value <= kLargestAttribute; }

}  // namespace

const char* correlation_message(CorrelationStatus status) {
  switch (status) {
    case CorrelationStatus::kOk:
      return "ok";
    case CorrelationStatus::kBadKernelSize:
      return "Correlation: kernel_size must be odd, 1 to 16384";
    case CorrelationStatus::kBadPad:
      return "Correlation: pad must be 0 to 16384";
    case CorrelationStatus::kBadMaxDisplacement:
      return "Correlation: max_displacement must be 0 to 16384";
    case CorrelationStatus::kBadStride1:
      return "Correlation: stride1 must be 1 to 16384";
    case CorrelationStatus::kBadStride2:
      return "Correlation: stride2 must be 1 to 16384";
    case CorrelationStatus::kBadShape:
      return "Correlation: a and b must have one shape [N, C, H, W], C, H and W at least 1";
    case CorrelationStatus::kInputTooSmall:
      return "Correlation: the padded input is smaller than 2 * (max_displacement + "
             "kernel_size / 2) + 1; make pad larger or max_displacement smaller";
    case CorrelationStatus::kTooLarge:
      return "Correlation: more elements than the kernel addresses; make the batch smaller";
    case CorrelationStatus::kLaunchFailed:
      return "Correlation: CUDA refused the kernel; was the library built for this GPU?";
  }
  return "Correlation: unknown status";
}

bool set_attribute(CorrelationAttributes* attributes, const char* name, int64_t value) {
  int32_t* const members[] = {&attributes->pad, &attributes->kernel_size,
                              &attributes->max_displacement, &attributes->stride1,
                              &attributes->stride2};
  for (size_t i = 0; i < sizeof(members) / sizeof(*members); ++i) {
    if (std::strcmp(name, kAttributeNames[i]) != 0) continue;
    const bool fits = value >= std::numeric_limits<int32_t>::min() &&
                      value <= std::numeric_limits<int32_t>::max();
    *members[i] = fits ? static_cast<int32_t>(value) : std::numeric_limits<int32_t>::max();
    return true;
  }
  return false;
}

CorrelationStatus check_attributes(const CorrelationAttributes& attributes) {
  if (!within(attributes.kernel_size, 1) || attributes.kernel_size % 2 == 0)
    return CorrelationStatus::kBadKernelSize;
  if (!within(attributes.pad, 0)) return CorrelationStatus::kBadPad;
  if (!within(attributes.max_displacement, 0)) return CorrelationStatus::kBadMaxDisplacement;
  if (!within(attributes.stride1, 1)) return CorrelationStatus::kBadStride1;
  if (!within(attributes.stride2, 1)) return CorrelationStatus::kBadStride2;
  return CorrelationStatus::kOk;
}

CorrelationStatus output_shape(const CorrelationAttributes& attributes, const FeatureShape& input,
                               FeatureShape* output) {
  const CorrelationStatus status = check_attributes(attributes);
  if (status != CorrelationStatus::kOk) return status;
  for (int64_t size : {input.channels, input.height, input.width})
    if (size < 1) return CorrelationStatus::kBadShape;
  for (int64_t size : {input.batch, input.channels, input.height, input.width})
    if (size < 0 || size > kLargestSize) return CorrelationStatus::kTooLarge;

  const int64_t border =
      2 * int64_t{attributes.pad} -
      2 * (int64_t{attributes.max_displacement} + attributes.kernel_size / 2);
  const int64_t height = input.height + border;
  const int64_t width = input.width + border;
  if (height < 1 || width < 1) return CorrelationStatus::kInputTooSmall;

  const int64_t displacements = 2 * int64_t{attributes.radius()} + 1;
  output->batch = input.batch;
  output->channels = displacements * displacements;
  output->height = (height + attributes.stride1 - 1) / attributes.stride1;
  output->width = (width + attributes.stride1 - 1) / attributes.stride1;

  // In double: exact enough to compare, and past int64 without overflowing.
  constexpr double kMost = static_cast<double>(std::numeric_limits<int64_t>::max() / 64);
  for (const FeatureShape& shape : {input, *output})
    if (1.0 * shape.batch * shape.channels * shape.height * shape.width > kMost)
      return CorrelationStatus::kTooLarge;
  return CorrelationStatus::kOk;
}

}  // namespace flownet2
