#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

#include "kernels/cuda/base/blocks.cuh"
#include "kernels/cuda/base/warp.cuh"

namespace moesaic::cuda {

/// Packed weights in device memory, of which a warp reads runs of whole blocks: [data, data +
/// bytes), data a multiple of 32.
struct WeightBytes {
  const std::uint8_t* data;
  std::int64_t bytes;
};

inline constexpr int kSector = 32;  // what DRAM moves at least

/// Bytes of shared memory that a run of `bytes` takes as whole sectors, wherever it begins.
__host__ __device__ constexpr int staged_bytes(int bytes) {
  return (bytes + 2 * kSector - 2) / kSector * kSector;
}

/// Queues the copy of bytes [begin, end) of w, widened to whole sectors, into shared memory (a
/// multiple of 16), by kLanes lanes of a warp, this one being the lane-th. Returns where the run's
/// first byte will stand. Rows of the file's formats begin at any even address; asynchronous copies
/// of 16 bytes do not.
template <int kLanes = kWarp>
__device__ inline const std::uint8_t* stage(const WeightBytes& w, std::int64_t begin,
                                            std::int64_t end, std::uint8_t* shared, int lane) {
  const std::int64_t first = begin / kSector * kSector;
  const std::int64_t last = min((end + kSector - 1) / kSector * kSector, w.bytes);
  for (std::int64_t at = first + 16 * lane; at < last; at += 16 * kLanes) {
    std::uint8_t* to = shared + (at - first);
    if (at + 16 <= last) {
      __pipeline_memcpy_async(to, w.data + at, 16);
    } else {  // the matrix ends here
      for (int i = 0; at + i < last; i += 2) {
        *reinterpret_cast<std::uint16_t*>(to + i) =
            *reinterpret_cast<const std::uint16_t*>(w.data + at + i);
      }
    }
  }
  return shared + (begin - first);
}

/// A warp's way through `n` packed columns: chunks of kChunk columns come into shared memory two
/// deep, so that one is on its way while the other is unpacked.
template <class Format>
struct RowStream {
  static constexpr int kChunk = 1024;
  static constexpr int kBuffer = staged_bytes(kChunk / Format::kElems * Format::kBytes);
  static constexpr int kSharedBytes = 2 * kBuffer;  // per warp

  /// Calls fn(first, count, values) for each 256 columns from `begin_byte` on: columns first +
  /// Format::column(lane, v) + i, i < kWidth, are in values[kWidth v + i]; count columns are left.
  template <class Fn>
  __device__ static void run(const WeightBytes& w, std::int64_t begin_byte, std::int64_t n,
                             std::uint8_t* shared, int lane, Fn fn) {
    const auto fetch = [&](std::int64_t c, int buffer) {
      const std::int64_t stop = min(c + kChunk, n);
      const std::uint8_t* at = stage(w, begin_byte + c / Format::kElems * Format::kBytes,
                                     begin_byte + stop / Format::kElems * Format::kBytes,
                                     shared + buffer * kBuffer, lane);
      __pipeline_commit();
      return at;
    };
    const std::uint8_t* current = n > 0 ? fetch(0, 0) : shared;
    int buffer = 0;
    for (std::int64_t c = 0; c < n; c += kChunk) {
      const std::uint8_t* next = shared;
      if (c + kChunk < n) {
        next = fetch(c + kChunk, buffer ^ 1);
        __pipeline_wait_prior(1);
      } else {
        __pipeline_wait_prior(0);
      }
      __syncwarp();
      const int count = static_cast<int>(min(static_cast<std::int64_t>(kChunk), n - c));
      for (int g = 0; g < count; g += kGroup) {
        float values[8];
        Format::unpack(current + g / Format::kElems * Format::kBytes, lane, count - g, values);
        fn(c + g, n - c - g, values);
      }
      __syncwarp();  // before the buffer is written again
      current = next;
      buffer ^= 1;
    }
  }
};

/// Format::kWidth neighbouring floats from a multiple of 4 · kWidth bytes; those from n on are zero
/// and not read.
template <int kWidth>
__device__ inline void load_floats(const float* p, std::int64_t n, float* v) {
  if (n >= kWidth) {
    if constexpr (kWidth == 4) {
      const float4 all = *reinterpret_cast<const float4*>(p);
      v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    } else {
      const float2 all = *reinterpret_cast<const float2*>(p);
      v[0] = all.x, v[1] = all.y;
    }
    return;
  }
  for (int i = 0; i < kWidth; ++i) v[i] = i < n ? p[i] : 0.0f;
}

/// The same way out.
template <int kWidth>
__device__ inline void store_floats(float* p, std::int64_t n, const float* v) {
  if (n >= kWidth) {
    if constexpr (kWidth == 4) {
      *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
    }
    return;
  }
  for (int i = 0; i < kWidth; ++i) {
    if (i < n) p[i] = v[i];
  }
}

}  // namespace moesaic::cuda
