// The correlation on the CPU: both images packed row by row, then a band of products per row.
//
// A packed row holds its channels one after the other, each padded with zeros and, for stride1 > 1,
// split into stride1 phases, so that the values which neighbouring outputs read lie side by side
// whatever the attributes. The arithmetic is in correlation_cpu_kernel.inc, compiled once for each
// instruction set; the processor decides at run time which of them runs.
// SPDX-License-Identifier: GPL-3.0-or-later
#include <cstring>
#include <numeric>

#include "correlation.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CORRELATION_X86 1
#include <immintrin.h>
#endif

namespace flownet2 {

namespace {

// Rows of outputs that share one row of b, and the most vector lanes of any instruction set.
constexpr int kRows = 3;
constexpr int64_t kMostLanes = 16;

// How rows of one image are packed: [row][channel][phase][column].
struct Packing {
  int64_t first;    // padded column that phase 0 begins with
  int64_t columns;  // of one phase
  int64_t channel;  // floats from a channel to the next
  int64_t row;      // floats from a row to the next

  // Offset in a channel of padded column `first + shift`, for output column 0.
  int64_t offset(int64_t shift, int64_t stride1) const {
    return shift % stride1 * columns + shift / stride1;
  }
};

struct Plan {
  CorrelationAttributes attributes;
  FeatureShape input;
  FeatureShape output;
  Packing pack_a;
  Packing pack_b;
  // Output rows y and y + row_step read the same row of b at displacement steps p, p - shift_step.
  int64_t row_step;
  int64_t shift_step;
  int64_t groups;  // of kRows output rows
};

// One batch item's work, as the threads see it.
struct Item {
  const Plan* plan;
  const void* a;
  const void* b;
  void* out;
  float* packed_a;
  float* packed_b;
  float* zeros;  // a row of either image that lies outside
};

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Packing make_packing(const Plan& plan, int64_t first, int64_t reach) {
  const int64_t stride1 = plan.attributes.stride1;
  Packing packing;
  packing.first = first;
  packing.columns = round_up(round_up(plan.output.width, kMostLanes) + reach / stride1, kMostLanes);
  packing.channel = packing.columns * stride1;
  packing.row = packing.channel * plan.input.channels;
  return packing;
}

CorrelationStatus make_plan(const CorrelationAttributes& attributes, const FeatureShape& input,
                            Plan* plan) {
  plan->attributes = attributes;
  plan->input = input;
  const CorrelationStatus status = output_shape(attributes, input, &plan->output);
  if (status != CorrelationStatus::kOk) return status;
  const int64_t kernel = attributes.kernel_size;
  const int64_t farthest = int64_t{attributes.radius()} * attributes.stride2;
  plan->pack_a = make_packing(*plan, attributes.max_displacement, kernel - 1);
  plan->pack_b =
      make_packing(*plan, attributes.max_displacement - farthest, 2 * farthest + kernel - 1);
  const int64_t common = std::gcd(attributes.stride1, attributes.stride2);
  plan->row_step = attributes.stride2 / common;
  plan->shift_step = attributes.stride1 / common;
  plan->groups = round_up(plan->output.height, plan->row_step * kRows) / kRows;
  return CorrelationStatus::kOk;
}

size_t zeros_size(const Plan& plan) {
  return plan.pack_a.row > plan.pack_b.row ? plan.pack_a.row : plan.pack_b.row;
}

// IEEE half <-> float for processors without an instruction for it.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  uint32_t bits = sign | ((magnitude << 13) + (uint32_t{112} << 23));
  if (magnitude >= 0x7c00) bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  if (magnitude < 0x400) {  // zero and subnormals: counts of 2^-24
    const float counts = static_cast<float>(magnitude) * 0x1p-24f;
    value = sign != 0 ? -counts : counts;
  }
  return value;
}

uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;            // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;           // rounds past 65504
  if (bits < 0x38800000) {                                // subnormal: count 2^-24, ties to even
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    const float counts = magnitude * 0x1p24f + 0x1p23f;   // 2^23: the sum's last bit counts one
    uint32_t rounded;
    std::memcpy(&rounded, &counts, sizeof(rounded));
    return sign | static_cast<uint16_t>(rounded & 0x7fffff);
  }
  bits += 0xfff + (bits >> 13 & 1);                       // ties to even
  return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

}  // namespace

// Each inclusion defines, for its instruction set: pack<T>(item, task), correlate<T>(item, task).
#define CORRELATION_LANES 4
#define CORRELATION_DISPLACEMENTS 3
namespace baseline {
#include "correlation_cpu_kernel.inc"
}
#undef CORRELATION_LANES
#undef CORRELATION_DISPLACEMENTS

#ifdef CORRELATION_X86
#define CORRELATION_F16C 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define CORRELATION_LANES 8
#define CORRELATION_DISPLACEMENTS 3
namespace avx2 {
#include "correlation_cpu_kernel.inc"
}
#undef CORRELATION_LANES
#undef CORRELATION_DISPLACEMENTS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,f16c")
#define CORRELATION_LANES 16
#define CORRELATION_DISPLACEMENTS 7
namespace avx512 {
#include "correlation_cpu_kernel.inc"
}
#undef CORRELATION_LANES
#undef CORRELATION_DISPLACEMENTS
#pragma GCC pop_options
#endif

namespace {

// The functions of one instruction set, for one element type.
struct Kernel {
  void (*pack)(const Item& item, int64_t task);
  void (*correlate)(const Item& item, int64_t task);
};

template <class T>
Kernel best_kernel() {
#ifdef CORRELATION_X86
  if (__builtin_cpu_supports("avx512f")) return {avx512::pack<T>, avx512::correlate<T>};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {avx2::pack<T>, avx2::correlate<T>};
#endif
  return {baseline::pack<T>, baseline::correlate<T>};
}

template <class T>
void run(const Plan& plan, const T* a, const T* b, T* out, float* workspace,
         const ParallelFor& parallel) {
  struct Job {
    Item item;
    Kernel kernel;
  };
  const int64_t height = plan.input.height;
  const int64_t in_size = plan.input.channels * height * plan.input.width;
  const int64_t out_size = plan.output.channels * plan.output.height * plan.output.width;
  float* packed_b = workspace + plan.pack_a.row * height;
  float* zeros = packed_b + plan.pack_b.row * height;
  std::memset(zeros, 0, zeros_size(plan) * sizeof(float));

  for (int64_t n = 0; n < plan.input.batch; ++n) {
    Job job{{&plan, a + n * in_size, b + n * in_size, out + n * out_size, workspace, packed_b, zeros},
            best_kernel<T>()};
    parallel.run(
        parallel.pool,
        [](void* context, size_t index) {
          const Job& job = *static_cast<const Job*>(context);
          job.kernel.pack(job.item, static_cast<int64_t>(index));
        },
        static_cast<size_t>(2 * height), &job);
    parallel.run(
        parallel.pool,
        [](void* context, size_t index) {
          const Job& job = *static_cast<const Job*>(context);
          job.kernel.correlate(job.item, static_cast<int64_t>(index));
        },
        static_cast<size_t>(plan.groups), &job);
  }
}

}  // namespace

size_t correlation_cpu_workspace(const CorrelationAttributes& attributes,
                                 const FeatureShape& input) {
  Plan plan;
  if (make_plan(attributes, input, &plan) != CorrelationStatus::kOk) return 0;
  const size_t rows = static_cast<size_t>(input.height);
  const size_t packed = static_cast<size_t>(plan.pack_a.row + plan.pack_b.row) * rows;
  return (packed + zeros_size(plan)) * sizeof(float);
}

CorrelationStatus correlation_cpu(const CorrelationAttributes& attributes,
                                  const FeatureShape& input, ElementType type, const void* a,
                                  const void* b, void* out, void* workspace,
                                  const ParallelFor& parallel) {
  Plan plan;
  const CorrelationStatus status = make_plan(attributes, input, &plan);
  if (status != CorrelationStatus::kOk) return status;
  if (type == ElementType::kFloat16) {
    run(plan, static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b),
        static_cast<uint16_t*>(out), static_cast<float*>(workspace), parallel);
  } else {
    run(plan, static_cast<const float*>(a), static_cast<const float*>(b),
        static_cast<float*>(out), static_cast<float*>(workspace), parallel);
  }
  return CorrelationStatus::kOk;
}

}  // namespace flownet2
