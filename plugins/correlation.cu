// The correlation on CUDA: FlowNet's attributes in half precision on the tensor cores, everything
// else by a plain kernel.
//
// With kernel_size 1, stride1 1, stride2 2 and pad = max_displacement = 20, output (y, x) multiplies
// a(y, x) with b at 21 even distances in y and 21 in x. So rows and columns fall into two parities
// that never meet. Within one, for output row y and row r = y + dy of b, all products are the band
// |j - i| <= 10 of the matrix sum_c a(c, y, i) b(c, r, j). The kernel computes such bands, for
// several rows y and several rows r in one tile, since neighbouring rows y read the same rows r.
// SPDX-License-Identifier: GPL-3.0-or-later
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tensor_core.cuh>

#include <type_traits>

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
struct FeatureMaps {
  const T* a;
  const T* b;
  T* out;
  int channels;
  int height;
  int width;

  __device__ int64_t plane() const { return static_cast<int64_t>(height) * width; }
  __device__ const T* item_of(const T* maps, int64_t n) const {
    return maps + n * channels * plane();
  }
};

__device__ bool inside(int value, int size) { return value >= 0 && value < size; }

// ---- FlowNet's attributes, half precision: bands on the tensor cores ------------------------

// A warp has one parity of 32 columns and one row r: for each of 4 rows y 16 columns i of a
// against 40 columns j of b. For eight columns i the band lies in 28 columns j: two tensor-core
// tiles of 16 (j) x 8 (i), beginning 12 columns before the first i. Sums are float.
constexpr int kRows = 4;
constexpr int kShifts = 4;
constexpr int kColumns = 32;
constexpr int kThreads = 256;
constexpr int kChannels = 16;  // staged at a time: one step of the tensor cores
constexpr int kOwn = 16;       // columns i of a warp
constexpr int kColumnsB = 40;  // columns j that they meet
constexpr int kMargin = 12;    // that many of them come before the first i
constexpr int kEights = kColumnsB / 8;
constexpr int kVector = 8;  // halves in a 16-byte load
constexpr int kVectorsA = kColumns / kVector;
constexpr int kVectorsB = 2 * kColumnsB / kVector;
// Rows of shared memory: eight of them begin in different banks.
constexpr int kPitchA = kOwn + 8;
constexpr int kPitchB = kColumnsB;
constexpr int kPitchSums = kColumnsB + 4;
constexpr int kSlots = kThreads / kChannels;  // threads that stage one channel
constexpr int kPerThreadB = (kShifts * kVectorsB + kSlots - 1) / kSlots;
static_assert(kSlots == kRows * kVectorsA, "each thread stages one vector of a");
static_assert(kThreads == 32 * kShifts * 2, "a warp for each row r and parity");

// The part of the output that one block computes: kRows rows y, y + 2, ..., which all read rows
// r = first_row, first_row + 2, ... (kShifts of them) of b, in kColumns columns from `column`.
// Output row k and the s-th of these rows are displacement `shift + s - k` of 0..20 in y.
struct Tile {
  static constexpr int kReach = kDisplacements + kRows - 1;  // rows r that kRows rows y read
  static constexpr int kParts = (kReach + kShifts - 1) / kShifts;

  int64_t item;
  int row;
  int shift;
  int column;

  // How many tiles cover the output.
  static int64_t count(const FeatureShape& shape) {
    return shape.batch * row_groups(static_cast<int>(shape.height)) * kParts *
           columns_of_tiles(static_cast<int>(shape.width));
  }

  // The tile of this block.
  __device__ Tile(int height, int width) {
    int index = blockIdx.x;
    column = index % columns_of_tiles(width) * kColumns;
    index /= columns_of_tiles(width);
    shift = index % kParts * kShifts;
    index /= kParts;
    const int group = index % row_groups(height);
    row = group / kStride * kStride * kRows + group % kStride;
    item = index / row_groups(height);
  }

  __device__ int first_row() const { return row + (shift - kRadius) * kStride; }

 private:
  __host__ __device__ static int row_groups(int height) {
    return (height + kStride * kRows - 1) / (kStride * kRows) * kStride;
  }
  __host__ __device__ static int columns_of_tiles(int width) {
    return (width + kColumns - 1) / kColumns;
  }
};

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

// Copies a tile's inputs to shared memory: of one channel, each thread a vector of a and up to
// kPerThreadB of b. The loads run one stage ahead of the stores.
template <bool kAligned>
class TileLoader {
 public:
  __device__ TileLoader(const FeatureMaps<__half>& maps, const Tile& tile)
      : maps_(maps),
        column_(tile.column),
        channels_left_(maps.channels - channel()),
        plane_((tile.item * maps.channels + channel()) * maps.plane()) {
    offset_a_ = offset(tile.row + slot() / kVectorsA * kStride, column_a());
#pragma unroll
    for (int i = 0; i < kPerThreadB; ++i) {
      const int r = tile.first_row() + index_b(i) / kVectorsB * kStride;
      offset_b_[i] = has(i) ? offset(r, column_b(i)) : kOutside;
    }
  }

  // Loads the next kChannels channels.
  __device__ void load() {
    vector_a_ = fetch(maps_.a, offset_a_, column_a());
#pragma unroll
    for (int i = 0; i < kPerThreadB; ++i)
      vector_b_[i] = fetch(maps_.b, offset_b_[i], column_b(i));
    channels_left_ -= kChannels;
    plane_ += kChannels * maps_.plane();
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
    const bool valid = inside(y, maps_.height) && (!kAligned || inside(x, maps_.width));
    return valid ? y * maps_.width + x : kOutside;
  }

  // Eight halves from column x on; zeros outside. Aligned, they are all inside or all outside.
  __device__ uint4 fetch(const __half* map, int offset, int x) const {
    uint4 vector = make_uint4(0, 0, 0, 0);
    if (offset == kOutside || channels_left_ <= 0) return vector;
    const __half* from = map + plane_ + offset;
    if constexpr (kAligned) {
      vector = *reinterpret_cast<const uint4*>(from);
    } else {
      __half halves[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        halves[i] = inside(x + i, maps_.width) ? from[i] : __float2half_rn(0);
      memcpy(&vector, halves, sizeof(vector));
    }
    return vector;
  }

  const FeatureMaps<__half>& maps_;  // a kernel's parameter: no registers
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
    correlate_flownet(FeatureMaps<__half> maps) {
  alignas(16) __shared__ Shared shared;
  const Tile tile(maps.height, maps.width);
  const int s = threadIdx.x / 64, parity = threadIdx.x / 32 % 2, lane = threadIdx.x % 32;
  const int row = lane % 8, matrix = lane / 8;

  float sums[kRows][2][2][4] = {};  // row y, eight columns i, 16 columns j, a lane's elements
  const int last_row = tile.first_row() + (kShifts - 1) * kStride;
  const bool zero = last_row < 0 || tile.first_row() >= maps.height;
  const int steps = zero ? 0 : (maps.channels + kChannels - 1) / kChannels;
  TileLoader<kAligned> loader(maps, tile);
  if (steps > 0) {
    loader.load();
    loader.store(&shared.stages[0]);
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const Stage& now = shared.stages[step % 2];
    const bool more = step + 1 < steps;
    if (more) loader.load();

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
        for (int part = 0; part < 2; ++part) {
          const int first = t + 2 * part;
          const uint32_t products[4] = {b[first][0], b[first + 1][0], b[first][1],
                                        b[first + 1][1]};
          multiply_add(products, columns, sums[k][t][part]);
        }
      }
    }
    if (more) loader.store(&shared.stages[(step + 1) % 2]);
    __syncthreads();
  }

  const float scale = 1.0f / maps.channels;
  const int64_t plane = maps.plane();
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 8 * t + lane % 4 * 2 + e % 2;
          const int j = 8 * t + 16 * part + lane / 4 + e / 2 * 8;
          shared.sums[s][parity][i][j] = sums[k][t][part][e];
        }
    __syncthreads();
    const int y = tile.row + k * kStride;
    for (int index = threadIdx.x; index < kShifts * kDisplacements * kOwn; index += kThreads) {
      const int i = index % kOwn, o = index / kOwn % kDisplacements;
      const int from = index / (kOwn * kDisplacements);
      const int p = tile.shift + from - k, x = tile.column + 2 * i;
      if (!inside(p, kDisplacements) || y >= maps.height || x >= maps.width) continue;
      const int j = i + o + kMargin - kRadius;
      const __half2 two = __floats2half2_rn(shared.sums[from][0][i][j] * scale,
                                            shared.sums[from][1][i][j] * scale);
      __half* to = maps.out +
                   (tile.item * kDisplacements * kDisplacements + p * kDisplacements + o) * plane +
                   static_cast<int64_t>(y) * maps.width + x;
      if (maps.width % 2 == 0) {
        *reinterpret_cast<__half2*>(to) = two;
      } else {
        to[0] = __low2half(two);
        if (x + 1 < maps.width) to[1] = __high2half(two);
      }
    }
    __syncthreads();
  }
}

// ---- any attributes, either type: a thread for each output ----------------------------------------------

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ void from_float(float value, float* to) { *to = value; }
__device__ void from_float(float value, __half* to) { *to = __float2half_rn(value); }

constexpr int kAnyThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    correlate_any(FeatureMaps<T> maps, CorrelationAttributes attributes, int radius, int height,
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

  const int64_t plane = maps.plane();
  const int border = attributes.max_displacement - attributes.pad;
  float sum = 0;
  for (int j = 0; j < attributes.kernel_size; ++j) {
    for (int i = 0; i < attributes.kernel_size; ++i) {
      const int ya = y * attributes.stride1 + border + j, xa = x * attributes.stride1 + border + i;
      if (!inside(ya, maps.height) || !inside(xa, maps.width) ||
          !inside(ya + dy, maps.height) || !inside(xa + dx, maps.width))
        continue;
      const T* a = maps.item_of(maps.a, item) + static_cast<int64_t>(ya) * maps.width + xa;
      const T* b = maps.item_of(maps.b, item) +
                   static_cast<int64_t>(ya + dy) * maps.width + xa + dx;
      for (int c = 0; c < maps.channels; ++c, a += plane, b += plane)
        sum += to_float(*a) * to_float(*b);
    }
  }
  const float kernel = attributes.kernel_size;
  from_float(sum / (kernel * kernel * maps.channels), maps.out + index);
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

CorrelationStatus launch_flownet(const FeatureShape& shape, const FeatureMaps<__half>& maps,
                                 cudaStream_t stream) {
  const bool aligned = shape.width % kVector == 0;
  return launch(aligned ? correlate_flownet<true> : correlate_flownet<false>, Tile::count(shape),
                kThreads, stream, maps);
}

template <class T>
CorrelationStatus run(const CorrelationAttributes& attributes, const FeatureShape& shape,
                      const FeatureShape& output, const void* a, const void* b, void* out,
                      cudaStream_t stream) {
  const FeatureMaps<T> maps = {static_cast<const T*>(a),
                               static_cast<const T*>(b),
                               static_cast<T*>(out),
                               static_cast<int>(shape.channels),
                               static_cast<int>(shape.height),
                               static_cast<int>(shape.width)};
  if constexpr (std::is_same_v<T, __half>) {
    // That kernel indexes within a channel by int.
    if (is_flownet(attributes) && shape.height * shape.width <= INT32_MAX)
      return launch_flownet(shape, maps, stream);
  }
  const int64_t count = output.batch * output.channels * output.height * output.width;
  return launch(correlate_any<T>, (count + kAnyThreads - 1) / kAnyThreads, kAnyThreads, stream,
                maps, attributes, attributes.radius(), static_cast<int>(output.height),
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
