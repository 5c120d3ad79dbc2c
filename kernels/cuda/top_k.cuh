#pragma once

#include <cstdint>

#include "kernels/cuda/base/warp.cuh"

namespace moesaic::cuda {

/// Scratch of block_top_k in shared memory.
struct TopKShared {
  std::uint32_t histogram[256];
  std::uint32_t warp_counts[2][32];
  std::uint32_t digit;
  std::int64_t rest;
};

/// Keys of the same order as the scores, −0 equal to 0, NaN equal to −∞.
__device__ inline std::uint32_t score_key(float score) {
  if (isnan(score)) score = -INFINITY;
  const std::uint32_t bits = __float_as_uint(score + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// top_k of one row by one block. Scores are read past the first-level cache: other blocks may just
/// have written them.
__device__ inline void block_top_k(const float* scores, std::int64_t n, std::int64_t k,
                                   std::int32_t* ids, TopKShared& s) {
  if (k == 0) return;
  const unsigned thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const unsigned n_warps = blockDim.x / kWarp;
  // Digit by digit from the top: among the keys with the digits found so far, the one that the
  // `rest`-th largest has next.
  std::uint32_t prefix = 0;
  std::int64_t rest = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (unsigned i = thread; i < 256; i += blockDim.x) s.histogram[i] = 0;
    __syncthreads();
    for (std::int64_t first = warp * kWarp; first < n; first += blockDim.x) {
      const std::int64_t i = first + lane;
      const std::uint32_t key = i < n ? score_key(__ldcg(scores + i)) : 0;
      const bool counts = i < n && (shift == 24 || (key ^ prefix) >> (shift + 8) == 0);
      // Scores share their upper digits: one addition per distinct digit of a warp.
      const std::uint32_t digit = counts ? key >> shift & 255u : 256u;
      const unsigned same = __match_any_sync(kAllLanes, digit);
      if (counts && lane == __ffs(same) - 1u) atomicAdd(&s.histogram[digit], __popc(same));
    }
    __syncthreads();
    if (warp == 0) {
      // Lane l sums digits 8 (31 − l) and up to 7 more, so that a scan over lanes goes downwards.
      const unsigned base = 8 * (kWarp - 1 - lane);
      std::uint32_t own = 0;
      for (int i = 0; i < 8; ++i) own += s.histogram[base + i];
      std::uint32_t above = own;
      for (unsigned offset = 1; offset < kWarp; offset *= 2) {
        const std::uint32_t other = __shfl_up_sync(kAllLanes, above, offset);
        if (lane >= offset) above += other;
      }
      above -= own;
      if (above < rest && above + own >= rest) {
        std::int64_t left = rest - above;
        int digit = 7;
        while (s.histogram[base + digit] < left) left -= s.histogram[base + digit--];
        s.digit = base + digit;
        s.rest = left;
      }
    }
    __syncthreads();
    prefix |= s.digit << shift;
    rest = s.rest;
    __syncthreads();
  }
  // All above the threshold, and the first `rest` at it. Both counts run along with the blocks'
  // strides over the row.
  std::int64_t above_before = 0, equal_before = 0;
  for (std::int64_t first = 0; first < n; first += blockDim.x) {
    const std::int64_t i = first + thread;
    const std::uint32_t key = i < n ? score_key(__ldcg(scores + i)) : 0;
    const bool above = i < n && key > prefix, equal = i < n && key == prefix;
    const unsigned above_lanes = __ballot_sync(kAllLanes, above);
    const unsigned equal_lanes = __ballot_sync(kAllLanes, equal);
    if (lane == 0) {
      s.warp_counts[0][warp] = __popc(above_lanes);
      s.warp_counts[1][warp] = __popc(equal_lanes);
    }
    __syncthreads();
    const unsigned lower = (1u << lane) - 1;
    std::int64_t my_above = above_before + __popc(above_lanes & lower);
    std::int64_t my_equal = equal_before + __popc(equal_lanes & lower);
    for (unsigned w = 0; w < n_warps; ++w) {
      if (w < warp) my_above += s.warp_counts[0][w], my_equal += s.warp_counts[1][w];
      above_before += s.warp_counts[0][w];
      equal_before += s.warp_counts[1][w];
    }
    if (above || (equal && my_equal < rest)) {
      ids[my_above + min(my_equal, rest)] = static_cast<std::int32_t>(i);
    }
    __syncthreads();
  }
}

}  // namespace moesaic::cuda
