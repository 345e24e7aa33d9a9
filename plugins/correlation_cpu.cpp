// The correlation on the CPU by its formula, for tests of the wrappers on machines without a GPU.
// It serves no requests. SPDX-License-Identifier: GPL-3.0-or-later
#include "correlation.h"

namespace flownet2 {

CorrelationStatus correlation_cpu(const CorrelationAttributes& attributes,
                                  const FeatureShape& input, const float* a, const float* b,
                                  float* out) {
  FeatureShape output;
  const CorrelationStatus status = output_shape(attributes, input, &output);
  if (status != CorrelationStatus::kOk) return status;

  const int64_t border = attributes.max_displacement - attributes.pad;
  const int64_t radius = attributes.radius();
  const int64_t kernel = attributes.kernel_size;
  const auto inside = [&](int64_t y, int64_t x) {
    return y >= 0 && y < input.height && x >= 0 && x < input.width;
  };
  const auto index = [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    return ((n * input.channels + c) * input.height + y) * input.width + x;
  };
  for (int64_t n = 0; n < output.batch; ++n)
    for (int64_t p = -radius; p <= radius; ++p)
      for (int64_t q = -radius; q <= radius; ++q)
        for (int64_t y = 0; y < output.height; ++y)
          for (int64_t x = 0; x < output.width; ++x) {
            float sum = 0;
            for (int64_t j = 0; j < kernel; ++j)
              for (int64_t i = 0; i < kernel; ++i) {
                const int64_t ya = y * attributes.stride1 + border + j;
                const int64_t xa = x * attributes.stride1 + border + i;
                const int64_t yb = ya + p * attributes.stride2, xb = xa + q * attributes.stride2;
                if (!inside(ya, xa) || !inside(yb, xb)) continue;
                for (int64_t c = 0; c < input.channels; ++c)
                  sum += a[index(n, c, ya, xa)] * b[index(n, c, yb, xb)];
              }
            *out++ = sum / static_cast<float>(kernel * kernel * input.channels);
          }
  return CorrelationStatus::kOk;
}

}  // namespace flownet2
