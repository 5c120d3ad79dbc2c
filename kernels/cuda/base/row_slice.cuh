#pragma once

#include "kernels/cuda/base/blocks.cuh"

namespace moesaic::cuda {

/// 8 kLanes neighbouring columns of a row, from a multiple of as many on, unpacked by kLanes lanes
/// of a warp, so that the warp has several rows at once: 8 lanes or more, 16 for Q6_K.
template <class Format, int kLanes>
struct RowSlice {
  static constexpr int kColumns = 8 * kLanes;
  static constexpr int kElems = Format::kElems;
  // Most bytes of the blocks that hold a slice.
  static constexpr int kMaxBytes =
      kColumns < kElems ? Format::kBytes : kColumns / kElems * Format::kBytes;

  /// The blocks that hold columns [c, c + n) of a row.
  __device__ static std::int64_t first_byte(std::int64_t c) { return c / kElems * Format::kBytes; }
  __device__ static std::int64_t end_byte(std::int64_t c, int n) {
    return (c + n + kElems - 1) / kElems * Format::kBytes;
  }
  /// The slice's column of lane l's values from kWidth v on.
  __device__ static int column(int l, int v) { return Format::column(l, v); }
  /// Lane l's eight values of the slice of n columns from c on; p is where its first block stands.
  __device__ static void unpack(const std::uint8_t* p, std::int64_t c, int l, int n,
                                float (&w)[8]) {
    const int before = static_cast<int>(c % kElems);
    Format::unpack(p, l + before / 8, n + before, w);
  }
};

template <class Scalar, int kLanes>
struct RowSlice<Plain<Scalar>, kLanes> {
  static constexpr int kColumns = 8 * kLanes;
  static constexpr int kMaxBytes = kColumns * Scalar::kBytes;

  __device__ static std::int64_t first_byte(std::int64_t c) { return c * Scalar::kBytes; }
  __device__ static std::int64_t end_byte(std::int64_t c, int n) {
    return (c + n) * Scalar::kBytes;
  }
  __device__ static int column(int l, int v) { return 4 * kLanes * v + 4 * l; }
  __device__ static void unpack(const std::uint8_t* p, std::int64_t, int l, int n, float (&w)[8]) {
    for (int v = 0; v < 2; ++v) {
      const int at = column(l, v);
      Scalar::load(p + at * Scalar::kBytes, n - at, w + 4 * v);
    }
  }
};

}  // namespace moesaic::cuda
