// The correlation on CUDA: FlowNet's attributes by two tiled kernels, all others by a plain one.
//
// With kernel_size 1, stride1 1, stride2 2 and pad = max_displacement = 20, output (y, x) multiplies
// a(y, x) with b at 21 even distances in y and 21 in x. So rows and columns fall into two parities
// that never meet. Within one, for output row y and row r = y + dy of b, all products are the band
// |j - i| <= 10 of the matrix sum_c a(c, y, i) b(c, r, j): the kernels compute bands, for some rows
// y and some rows r at once, since neighbouring rows y read the same rows r.
// SPDX-License-Identifier: GPL-3.0-or-later
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <tensor_core.cuh>

#include "correlation.h"

namespace flownet2 {

namespace {

constexpr int kRadius = 10;
constexpr int kDisplacements = 2 * kRadius + 1;  // in y, and in x
constexpr int kStride = 2;

bool is_flownet(const CorrelationAttributes& attributes) {
  return attributes.kernel_size == 1 && attributes.stride1 == 1 &&
         attributes.stride2 == kStride && attributes.max_displacement == kRadius * kStride &&
         attributes.pad == kRadius * kStride;
}

template <class T>
struct Images {
  const T* a;
  const T* b;
  T* out;
  int channels;
  int height;
  int width;

  __device__ int64_t plane() const { return static_cast<int64_t>(height) * width; }
  __device__ const T* item_of(const T* image, int64_t n) const {
    return image + n * channels * plane();
  }
};

// Where a block of a tiled kernel works: kRows output rows y, y + 2, ..., which all read rows
// r = first_row, first_row + 2, ... (kShifts of them) of b, in kColumns columns from `column`.
// Output row k and the s-th of these rows are displacement `shift + s - k` of 0..20 in y.
struct Place {
  int64_t item;
  int row;
  int shift;
  int column;

  __device__ int first_row() const { return row + (shift - kRadius) * kStride; }
};

template <int kRows, int kShifts, int kColumns>
struct Tiling {
  static constexpr int kReach = kDisplacements + kRows - 1;  // rows r that kRows rows y read
  static constexpr int kParts = (kReach + kShifts - 1) / kShifts;

  static int64_t blocks(const FeatureShape& shape) {
    return shape.batch * row_groups(static_cast<int>(shape.height)) * kParts *
           column_tiles(static_cast<int>(shape.width));
  }

  __device__ static Place place(int height, int width) {
    int index = blockIdx.x;
    Place place;
    place.column = index % column_tiles(width) * kColumns;
    index /= column_tiles(width);
    place.shift = index % kParts * kShifts;
    index /= kParts;
    const int group = index % row_groups(height);
    place.row = group / kStride * kStride * kRows + group % kStride;
    place.item = index / row_groups(height);
    return place;
  }

 private:
  __host__ __device__ static int row_groups(int height) {
    return (height + kStride * kRows - 1) / (kStride * kRows) * kStride;
  }
  __host__ __device__ static int column_tiles(int width) {
    return (width + kColumns - 1) / kColumns;
  }
};

__device__ bool inside(int value, int size) { return value >= 0 && value < size; }

// ---- float: register tiles on the FMA units -------------------------------------------------

// A thread keeps 2 rows y x 4 columns of one parity x 21 displacements in x for one row r: 168 sums,
// fed by 2 + 6 vector loads from shared memory a channel. A half-warp covers 64 columns.
namespace fp32 {

constexpr int kRows = 2;
constexpr int kShifts = 8;
constexpr int kColumns = 64;
constexpr int kThreads = 128;
constexpr int kChannels = 4;  // staged at a time
constexpr int kOwn = 4;       // columns of a thread
constexpr int kHalf = kColumns / 2;
constexpr int kWindow = kHalf + 2 * kRadius;  // columns of b of one parity that a block reads
using Tiles = Tiling<kRows, kShifts, kColumns>;

struct Stage {
  float a[kRows][kChannels][2][kHalf];
  float b[kShifts][kChannels][2][kWindow];
};

// Starts copying channels [channel, channel + kChannels) of what the block reads; zeros outside.
__device__ void stage(const Images<float>& images, const Place& place, int channel, Stage* to) {
  const int64_t plane = images.plane();
  const float* a = images.item_of(images.a, place.item) + channel * plane;
  const float* b = images.item_of(images.b, place.item) + channel * plane;
  {
    const int column = threadIdx.x % kColumns, k = threadIdx.x / kColumns;
    const int y = place.row + k * kStride, x = place.column + column;
    const bool valid = y < images.height && x < images.width;
    for (int c = 0; c < kChannels; ++c) {
      const bool wanted = valid && channel + c < images.channels;
      const float* from =
          wanted ? a + c * plane + static_cast<int64_t>(y) * images.width + x : images.a;
      __pipeline_memcpy_async(&to->a[k][c][column % 2][column / 2], from, sizeof(float),
                              wanted ? 0 : sizeof(float));
    }
  }
  const int column = threadIdx.x;
  if (column < 2 * kWindow) {
    const int x = place.column - kRadius * kStride + column;
    for (int s = 0; s < kShifts; ++s) {
      const int r = place.first_row() + s * kStride;
      const bool valid = inside(r, images.height) && inside(x, images.width);
      for (int c = 0; c < kChannels; ++c) {
        const bool wanted = valid && channel + c < images.channels;
        const float* from =
            wanted ? b + c * plane + static_cast<int64_t>(r) * images.width + x : images.b;
        __pipeline_memcpy_async(&to->b[s][c][column % 2][column / 2], from, sizeof(float),
                                wanted ? 0 : sizeof(float));
      }
    }
  }
  __pipeline_commit();
}

__global__ void __launch_bounds__(kThreads, 2) correlate(Images<float> images) {
  alignas(16) __shared__ Stage stages[2];
  const Place place = Tiles::place(images.height, images.width);
  const int s = threadIdx.x / 16;                 // which row r
  const int parity = threadIdx.x / 8 % 2;         // 8 lanes side by side read 32 floats in a row
  const int own = threadIdx.x % 8 * kOwn;         // first column, counted within the parity

  float sums[kRows][kDisplacements][kOwn] = {};
  const int last_row = place.first_row() + (kShifts - 1) * kStride;
  const bool zero = last_row < 0 || place.first_row() >= images.height;
  const int steps = zero ? 0 : (images.channels + kChannels - 1) / kChannels;
  if (steps > 0) stage(images, place, 0, &stages[0]);
  for (int step = 0; step < steps; ++step) {
    const Stage& now = stages[step % 2];
    if (step + 1 < steps) {
      stage(images, place, (step + 1) * kChannels, &stages[(step + 1) % 2]);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < kChannels; ++c) {
      float a[kRows][kOwn], b[kDisplacements + kOwn - 1];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const float4 four = *reinterpret_cast<const float4*>(&now.a[k][c][parity][own]);
        a[k][0] = four.x, a[k][1] = four.y, a[k][2] = four.z, a[k][3] = four.w;
      }
#pragma unroll
      for (int j = 0; j < kDisplacements + kOwn - 1; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&now.b[s][c][parity][own + j]);
        b[j] = four.x, b[j + 1] = four.y, b[j + 2] = four.z, b[j + 3] = four.w;
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k)
#pragma unroll
        for (int o = 0; o < kDisplacements; ++o)
#pragma unroll
          for (int i = 0; i < kOwn; ++i) sums[k][o][i] += a[k][i] * b[o + i];
    }
    __syncthreads();
  }

  // The two parities of a group of columns swap halves, so that each thread has 4 neighbours.
  const float scale = 1.0f / images.channels;
  const int64_t plane = images.plane();
  const int x = place.column + 2 * own + parity * kOwn;
  const bool vector = images.width % 4 == 0;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const int y = place.row + k * kStride;
    const int p = place.shift + s - k;
    const bool wanted = inside(p, kDisplacements) && y < images.height && x < images.width;
    float* out = images.out +
                 (place.item * kDisplacements * kDisplacements + p * kDisplacements) * plane +
                 static_cast<int64_t>(y) * images.width + x;
#pragma unroll
    for (int o = 0; o < kDisplacements; ++o) {
      const float* mine = sums[k][o];
      const float first = __shfl_xor_sync(0xffffffffu, parity ? mine[0] : mine[2], 8) * scale;
      const float second = __shfl_xor_sync(0xffffffffu, parity ? mine[1] : mine[3], 8) * scale;
      const float third = (parity ? mine[2] : mine[0]) * scale;
      const float fourth = (parity ? mine[3] : mine[1]) * scale;
      const float4 four = parity ? make_float4(first, third, second, fourth)
                                 : make_float4(third, first, fourth, second);
      if (!wanted) continue;
      float* to = out + o * plane;
      if (vector) {
        *reinterpret_cast<float4*>(to) = four;
      } else {
        to[0] = four.x;
        if (x + 1 < images.width) to[1] = four.y;
        if (x + 2 < images.width) to[2] = four.z;
        if (x + 3 < images.width) to[3] = four.w;
      }
    }
  }
}

}  // namespace fp32

// ---- half: bands on the tensor cores ---------------------------------------------------------

// A warp has one parity of 32 columns and one row r: for each of 4 rows y the 16 columns i of a
// against 40 columns j of b. In eights of i, the band lies in 28 columns j: two tiles of 16 (j) x 8
// (i), beginning at the same column as i counted from 12 columns before it. Sums are float.
namespace fp16 {

constexpr int kRows = 4;
constexpr int kShifts = 4;
constexpr int kColumns = 32;
constexpr int kThreads = 256;
constexpr int kChannels = 16;  // staged at a time: one step of the tensor cores
constexpr int kOwn = 16;       // columns i of a warp
constexpr int kReach = 40;     // columns j that they meet
constexpr int kMargin = 12;    // of which so many come before the first i
constexpr int kEights = kReach / 8;
constexpr int kVector = 8;  // halves to a 16-byte load
constexpr int kVectorsA = kColumns / kVector;
constexpr int kVectorsB = 2 * kReach / kVector;
// Rows of shared memory: eight of them begin in different banks.
constexpr int kPitchA = kOwn + 8;
constexpr int kPitchB = kReach;
constexpr int kPitchSums = kReach + 4;
constexpr int kSlots = kThreads / kChannels;  // threads that stage one channel
constexpr int kPerThreadB = (kShifts * kVectorsB + kSlots - 1) / kSlots;
using Tiles = Tiling<kRows, kShifts, kColumns>;
static_assert(kSlots == kRows * kVectorsA, "each thread stages one vector of a");
static_assert(kThreads == 32 * kShifts * 2, "a warp for each row r and parity");

struct Stage {
  __half a[kRows][2][kChannels][kPitchA];
  __half b[kShifts][2][kChannels][kPitchB];
};

union Shared {
  Stage stages[2];
  float sums[kShifts][2][kOwn][kPitchSums];
};

// Writes eight neighbouring columns as four of each parity.
__device__ void split(uint4 vector, __half* even, __half* odd) {
  *reinterpret_cast<uint2*>(even) = make_uint2(__byte_perm(vector.x, vector.y, 0x5410),
                                               __byte_perm(vector.z, vector.w, 0x5410));
  *reinterpret_cast<uint2*>(odd) = make_uint2(__byte_perm(vector.x, vector.y, 0x7632),
                                              __byte_perm(vector.z, vector.w, 0x7632));
}

// What one thread stages: of one channel, a vector of a and up to kPerThreadB of b. The loads run
// one stage ahead of the stores.
template <bool kAligned>
class Share {
 public:
  __device__ Share(const Images<__half>& images, const Place& place)
      : images_(images),
        column_(place.column),
        channels_left_(images.channels - channel()),
        plane_((place.item * images.channels + channel()) * images.plane()) {
    offset_a_ = offset(place.row + slot() / kVectorsA * kStride, column_a());
#pragma unroll
    for (int i = 0; i < kPerThreadB; ++i) {
      const int r = place.first_row() + index_b(i) / kVectorsB * kStride;
      offset_b_[i] = has(i) ? offset(r, column_b(i)) : kOutside;
    }
  }

  // Loads the next kChannels channels.
  __device__ void load() {
    vector_a_ = fetch(images_.a, offset_a_, column_a());
#pragma unroll
    for (int i = 0; i < kPerThreadB; ++i)
      vector_b_[i] = fetch(images_.b, offset_b_[i], column_b(i));
    channels_left_ -= kChannels;
    plane_ += kChannels * images_.plane();
  }

  // Stores what was loaded last.
  __device__ void store(Stage* to) const {
    const int k = slot() / kVectorsA, column = slot() % kVectorsA * 4;
    split(vector_a_, &to->a[k][0][channel()][column], &to->a[k][1][channel()][column]);
#pragma unroll
    for (int i = 0; i < kPerThreadB; ++i) {
      const int s = index_b(i) / kVectorsB, j = index_b(i) % kVectorsB * 4;
      if (has(i)) split(vector_b_[i], &to->b[s][0][channel()][j], &to->b[s][1][channel()][j]);
    }
  }

 private:
  static constexpr int kOutside = INT32_MIN;

  __device__ static int channel() { return threadIdx.x / kSlots; }
  __device__ static int slot() { return threadIdx.x % kSlots; }
  __device__ static int index_b(int i) { return slot() + i * kSlots; }
  __device__ static bool has(int i) { return index_b(i) < kShifts * kVectorsB; }
  __device__ int column_a() const { return column_ + slot() % kVectorsA * kVector; }
  __device__ int column_b(int i) const {
    return column_ - 2 * kMargin + index_b(i) % kVectorsB * kVector;
  }

  // Where column x of row y is in a channel, or kOutside.
  __device__ int offset(int y, int x) const {
    const bool valid = inside(y, images_.height) && (!kAligned || inside(x, images_.width));
    return valid ? y * images_.width + x : kOutside;
  }

  // Eight halves from column x on; zeros outside. Aligned, they are all inside or all outside.
  __device__ uint4 fetch(const __half* image, int offset, int x) const {
    uint4 vector = make_uint4(0, 0, 0, 0);
    if (offset == kOutside || channels_left_ <= 0) return vector;
    const __half* from = image + plane_ + offset;
    if constexpr (kAligned) {
      vector = *reinterpret_cast<const uint4*>(from);
    } else {
      __half halves[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        halves[i] = inside(x + i, images_.width) ? from[i] : __float2half_rn(0);
      memcpy(&vector, halves, sizeof(vector));
    }
    return vector;
  }

  const Images<__half>& images_;  // a kernel's parameter: no registers
  int column_;
  int channels_left_;
  int64_t plane_;  // where this thread's channel begins
  int offset_a_;
  int offset_b_[kPerThreadB];
  uint4 vector_a_;
  uint4 vector_b_[kPerThreadB];
};

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1)
    correlate(Images<__half> images) {
  alignas(16) __shared__ Shared shared;
  const Place place = Tiles::place(images.height, images.width);
  const int s = threadIdx.x / 64, parity = threadIdx.x / 32 % 2, lane = threadIdx.x % 32;
  const int row = lane % 8, matrix = lane / 8;

  float sums[kRows][2][2][4] = {};  // row y, eight columns i, tile of j, elements of a lane
  const int last_row = place.first_row() + (kShifts - 1) * kStride;
  const bool zero = last_row < 0 || place.first_row() >= images.height;
  const int steps = zero ? 0 : (images.channels + kChannels - 1) / kChannels;
  Share<kAligned> share(images, place);
  if (steps > 0) {
    share.load();
    share.store(&shared.stages[0]);
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const Stage& now = shared.stages[step % 2];
    const bool more = step + 1 < steps;
    if (more) share.load();

    // Eights of columns j, each for channels 0..7 and 8..15.
    uint32_t b[kEights][2];
    const __half(&rows_b)[kChannels][kPitchB] = now.b[s][parity];
#pragma unroll
    for (int eight = 0; eight < kEights - 1; eight += 2) {
      uint32_t four[4];
      load_transposed(&rows_b[matrix / 2 * 8 + row][(eight + matrix % 2) * 8], four);
      b[eight][0] = four[0], b[eight + 1][0] = four[1];
      b[eight][1] = four[2], b[eight + 1][1] = four[3];
    }
    load_transposed(&rows_b[matrix % 2 * 8 + row][(kEights - 1) * 8], b[kEights - 1]);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      uint32_t a[4];  // eight columns i, channels 0..7 and 8..15, then the next eight
      load_transposed(&now.a[k][parity][matrix % 2 * 8 + row][matrix / 2 * 8], a);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint32_t columns[2] = {a[2 * t], a[2 * t + 1]};
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int first = t + 2 * tile;
          const uint32_t products[4] = {b[first][0], b[first + 1][0], b[first][1],
                                        b[first + 1][1]};
          multiply_add(products, columns, sums[k][t][tile]);
        }
      }
    }
    if (more) share.store(&shared.stages[(step + 1) % 2]);
    __syncthreads();
  }

  const float scale = 1.0f / images.channels;
  const int64_t plane = images.plane();
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 8 * t + lane % 4 * 2 + e % 2;
          const int j = 8 * t + 16 * tile + lane / 4 + e / 2 * 8;
          shared.sums[s][parity][i][j] = sums[k][t][tile][e];
        }
    __syncthreads();
    const int y = place.row + k * kStride;
    for (int index = threadIdx.x; index < kShifts * kDisplacements * kOwn; index += kThreads) {
      const int i = index % kOwn, o = index / kOwn % kDisplacements;
      const int from = index / (kOwn * kDisplacements);
      const int p = place.shift + from - k, x = place.column + 2 * i;
      if (!inside(p, kDisplacements) || y >= images.height || x >= images.width) continue;
      const int j = i + o + kMargin - kRadius;
      const __half2 two = __floats2half2_rn(shared.sums[from][0][i][j] * scale,
                                            shared.sums[from][1][i][j] * scale);
      __half* to = images.out +
                   (place.item * kDisplacements * kDisplacements + p * kDisplacements + o) * plane +
                   static_cast<int64_t>(y) * images.width + x;
      if (images.width % 2 == 0) {
        *reinterpret_cast<__half2*>(to) = two;
      } else {
        to[0] = __low2half(two);
        if (x + 1 < images.width) to[1] = __high2half(two);
      }
    }
    __syncthreads();
  }
}

}  // namespace fp16

// ---- any attributes: a thread for each output ----------------------------------------------

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ void from_float(float value, float* to) { *to = value; }
__device__ void from_float(float value, __half* to) { *to = __float2half_rn(value); }

constexpr int kAnyThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    correlate_any(Images<T> images, CorrelationAttributes attributes, int radius, int height,
                  int width, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAnyThreads + threadIdx.x;
  if (index >= count) return;
  const int displacements = 2 * radius + 1;
  const int x = static_cast<int>(index % width);
  const int y = static_cast<int>(index / width % height);
  const int64_t channel = index / width / height;
  const int dx = (static_cast<int>(channel % displacements) - radius) * attributes.stride2;
  const int dy =
      (static_cast<int>(channel / displacements % displacements) - radius) * attributes.stride2;
  const int64_t item = channel / displacements / displacements;

  const int64_t plane = images.plane();
  const int border = attributes.max_displacement - attributes.pad;
  float sum = 0;
  for (int j = 0; j < attributes.kernel_size; ++j) {
    for (int i = 0; i < attributes.kernel_size; ++i) {
      const int ya = y * attributes.stride1 + border + j, xa = x * attributes.stride1 + border + i;
      if (!inside(ya, images.height) || !inside(xa, images.width) ||
          !inside(ya + dy, images.height) || !inside(xa + dx, images.width))
        continue;
      const T* a = images.item_of(images.a, item) + static_cast<int64_t>(ya) * images.width + xa;
      const T* b = images.item_of(images.b, item) +
                   static_cast<int64_t>(ya + dy) * images.width + xa + dx;
      for (int c = 0; c < images.channels; ++c, a += plane, b += plane)
        sum += to_float(*a) * to_float(*b);
    }
  }
  const float kernel = attributes.kernel_size;
  from_float(sum / (kernel * kernel * images.channels), images.out + index);
}

// ---- launching --------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
CorrelationStatus launch(void (*kernel)(Parameters...), int64_t blocks, int threads,
                         cudaStream_t stream, Arguments... arguments) {
  if (blocks > INT32_MAX) return CorrelationStatus::kTooLarge;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  if (cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess)
    return CorrelationStatus::kOk;
  cudaGetLastError();  // reported here: the next call that asks must not find it again
  return CorrelationStatus::kLaunchFailed;
}

CorrelationStatus launch_flownet(const FeatureShape& shape, const Images<float>& images,
                                 cudaStream_t stream) {
  return launch(fp32::correlate, fp32::Tiles::blocks(shape), fp32::kThreads, stream, images);
}

CorrelationStatus launch_flownet(const FeatureShape& shape, const Images<__half>& images,
                                 cudaStream_t stream) {
  const bool aligned = shape.width % fp16::kVector == 0;
  return launch(aligned ? fp16::correlate<true> : fp16::correlate<false>,
                fp16::Tiles::blocks(shape), fp16::kThreads, stream, images);
}

template <class T>
CorrelationStatus run(const CorrelationAttributes& attributes, const FeatureShape& shape,
                      const FeatureShape& output, const void* a, const void* b, void* out,
                      cudaStream_t stream) {
  const Images<T> images = {static_cast<const T*>(a),
                            static_cast<const T*>(b),
                            static_cast<T*>(out),
                            static_cast<int>(shape.channels),
                            static_cast<int>(shape.height),
                            static_cast<int>(shape.width)};
  // The tiled kernels index within a channel by int.
  if (is_flownet(attributes) && shape.height * shape.width <= INT32_MAX)
    return launch_flownet(shape, images, stream);
  const int64_t count = output.batch * output.channels * output.height * output.width;
  return launch(correlate_any<T>, (count + kAnyThreads - 1) / kAnyThreads, kAnyThreads, stream,
                images, attributes, attributes.radius(), static_cast<int>(output.height),
                static_cast<int>(output.width), count);
}

}  // namespace

CorrelationStatus correlation_cuda(const CorrelationAttributes& attributes,
                                   const FeatureShape& input, ElementType type, const void* a,
                                   const void* b, void* out, CUstream_st* stream) {
  FeatureShape output;
  const CorrelationStatus status = output_shape(attributes, input, &output);
  if (status != CorrelationStatus::kOk || input.batch == 0) return status;
  return type == ElementType::kFloat16
             ? run<__half>(attributes, input, output, a, b, out, stream)
             : run<float>(attributes, input, output, a, b, out, stream);
}

}  // namespace flownet2
