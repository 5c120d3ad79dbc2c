#pragma once

#include "kernels/cuda/base/blocks.cuh"
#include "kernels/cuda/base/column_panels.h"
#include "kernels/cuda/base/warp.cuh"

namespace moesaic::cuda {

// A lane's eight codes of a column: the i-th is that of row 32 (i / 4) + 4 l + i % 4 of the panel,
// l being the lane's place among the column's eight.

struct NibbleCodes {
  static constexpr int kBytes = 32;
  std::uint32_t word;
  __device__ void load(const std::uint8_t* column, int l) {
    word = *reinterpret_cast<const std::uint32_t*>(column + 4 * l);
  }
  __device__ float operator[](int i) const { return static_cast<float>(word >> (4 * i) & 15u); }
};

struct ByteCodes {
  static constexpr int kBytes = 64;
  std::uint32_t words[2];
  __device__ void load(const std::uint8_t* column, int l) {
    for (int v = 0; v < 2; ++v) {
      words[v] = *reinterpret_cast<const std::uint32_t*>(column + 32 * v + 4 * l);
    }
  }
  __device__ float operator[](int i) const {
    return static_cast<float>(static_cast<std::int8_t>(byte_of(words[i / 4], i % 4)));
  }
};

template <bool kBFloat>
struct HalfCodes {
  static constexpr int kBytes = 128;
  uint2 words[2];
  __device__ void load(const std::uint8_t* column, int l) {
    for (int v = 0; v < 2; ++v) words[v] = *reinterpret_cast<const uint2*>(column + 64 * v + 8 * l);
  }
  __device__ float operator[](int i) const {
    const uint2 pair = words[i / 4];
    const std::uint32_t bits = ((i & 2) != 0 ? pair.y : pair.x) >> (16 * (i & 1)) & 0xffffu;
    if constexpr (kBFloat) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

struct FloatCodes {
  static constexpr int kBytes = 256;
  float4 words[2];
  __device__ void load(const std::uint8_t* column, int l) {
    for (int v = 0; v < 2; ++v) {
      words[v] = *reinterpret_cast<const float4*>(column + 128 * v + 16 * l);
    }
  }
  __device__ float operator[](int i) const {
    const float4 four = words[i / 4];
    return (i & 2) != 0 ? ((i & 1) != 0 ? four.w : four.z) : ((i & 1) != 0 ? four.y : four.x);
  }
};

// A lane's eight scales of a unit, and Σ x code with them; `total` is Σ x.

struct NoScales {
  static constexpr int kBytes = 0;
  __device__ void load(const std::uint8_t*, int) {}
  __device__ float apply(int, float sum, float) const { return sum; }
};

/// d (code − kBias).
template <int kBias>
struct Scales {
  static constexpr int kBytes = 2;
  HalfCodes<false> d;
  __device__ void load(const std::uint8_t* scales, int l) { d.load(scales, l); }
  __device__ float apply(int i, float sum, float total) const {
    return d[i] * fmaf(-static_cast<float>(kBias), total, sum);
  }
};

/// d code + m.
struct ScalesAndMinima {
  static constexpr int kBytes = 4;
  uint4 pairs[2];
  __device__ void load(const std::uint8_t* scales, int l) {
    for (int v = 0; v < 2; ++v) {
      pairs[v] = *reinterpret_cast<const uint4*>(scales + 128 * v + 16 * l);
    }
  }
  __device__ float apply(int i, float sum, float total) const {
    const uint4 four = pairs[i / 4];
    const std::uint32_t pair =
        (i & 2) != 0 ? ((i & 1) != 0 ? four.w : four.z) : ((i & 1) != 0 ? four.y : four.x);
    const float d = __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
    const float m = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
    return fmaf(d, sum, m * total);
  }
};

/// A format in column panels, and the same in rows.
template <class CodesOf8, class ScalesOf8, class RowFormat>
struct ColumnFormat {
  using Codes = CodesOf8;
  using Scales = ScalesOf8;
  using Row = RowFormat;
  static constexpr int kScaleBytes = kColumnRows * Scales::kBytes;
  static constexpr int kUnitBytes = kScaleBytes + kColumnUnit * Codes::kBytes;
};

/// Calls fn.template operator()<Format>() with the column format of a dtype that has one.
template <class Fn>
void visit_column_format(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::F32:
      return fn.template operator()<ColumnFormat<FloatCodes, NoScales, F32>>();
    case DType::F16:
      return fn.template operator()<ColumnFormat<HalfCodes<false>, NoScales, F16>>();
    case DType::BF16:
      return fn.template operator()<ColumnFormat<HalfCodes<true>, NoScales, BF16>>();
    case DType::Q4_0:
      return fn.template operator()<ColumnFormat<NibbleCodes, Scales<8>, Q4_0>>();
    case DType::Q4_1:
      return fn.template operator()<ColumnFormat<NibbleCodes, ScalesAndMinima, Q4_1>>();
    case DType::Q8_0:
      return fn.template operator()<ColumnFormat<ByteCodes, Scales<0>, Q8_0>>();
    default:
      throw ShapeError(fmt::format("column panels: {} has none", traits(dtype).name));
  }
}

/// Shared memory of panel_sums.
template <int kWarps>
struct PanelShared {
  float values[kWarps][kColumnUnit];
  int columns[kWarps][kColumnUnit];
  float sums[kWarps][kColumnRows];
};

/// to[r] = Σ_c w[r][c] value_of(c) of one panel over columns [32 first_unit, min(32 last_unit,
/// cols)), by a block of kWarps warps; columns of value 0 are not read. Float32 sums in an order
/// that the units and the entries that count give. All threads may read `to` (shared) afterwards.
template <class Format, int kWarps, class ValueOf>
__device__ void panel_sums(const std::uint8_t* panel, std::int64_t first_unit,
                           std::int64_t last_unit, std::int64_t cols, ValueOf value_of,
                           PanelShared<kWarps>& shared, float* to) {
  constexpr int kDepth = 4;                               // columns on their way to a lane
  constexpr int kAtOnce = kWarp / kColumnLanes * kDepth;  // and to a warp
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / kColumnLanes, l = lane % kColumnLanes;
  float sum[8] = {};
  for (std::int64_t u = first_unit + warp; u < last_unit; u += kWarps) {
    const std::int64_t column = u * kColumnUnit + lane;
    const float value = column < cols ? value_of(column) : 0.0f;
    const unsigned mask = __ballot_sync(kAllLanes, value != 0);
    if (mask == 0) continue;
    if (value != 0) {
      const int place = __popc(mask & ((1u << lane) - 1));
      shared.values[warp][place] = value;
      shared.columns[warp][place] = lane;
    }
    __syncwarp();
    const std::uint8_t* unit = panel + u * Format::kUnitBytes;
    typename Format::Scales scales;
    scales.load(unit, l);
    const int n = __popc(mask);
    float part[8] = {}, total = 0;
    for (int first = 0; first < n; first += kAtOnce) {
      typename Format::Codes codes[kDepth];
      float x[kDepth];
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int k = first + d * (kWarp / kColumnLanes) + group;
        x[d] = 0;
        codes[d] = {};
        if (k >= n) continue;
        x[d] = shared.values[warp][k];
        codes[d].load(unit + Format::kScaleBytes + shared.columns[warp][k] * Format::Codes::kBytes,
                      l);
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        total += x[d];
        for (int i = 0; i < 8; ++i) part[i] = fmaf(x[d], codes[d][i], part[i]);
      }
    }
    for (int i = 0; i < 8; ++i) sum[i] += scales.apply(i, part[i], total);
    __syncwarp();  // before the lists are written again
  }
  for (int i = 0; i < 8; ++i) {
    sum[i] += __shfl_xor_sync(kAllLanes, sum[i], kColumnLanes);
    sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2 * kColumnLanes);
    if (group == 0) shared.sums[warp][i / 4 * 32 + 4 * l + i % 4] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x < kColumnRows) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w][threadIdx.x];
    to[threadIdx.x] = total;
  }
  __syncthreads();
}

}  // namespace moesaic::cuda
