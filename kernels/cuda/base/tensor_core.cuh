#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace moesaic::cuda {

/// D += A B by one warp: A [16, 16] and B [16, 8] of bfloat16, D of float32. With g = lane / 4 and
/// i = lane % 4 a lane has, as pairs of columns with the lower one in the lower half,
/// - a[0], a[1]: columns 2 i of rows g, g + 8; a[2], a[3]: columns 2 i + 8 of them;
/// - b0, b1: rows 2 i and 2 i + 1, 2 i + 8 and 2 i + 9 of column g;
/// - d[0], d[1]: columns 2 i, 2 i + 1 of row g; d[2], d[3] of row g + 8.
/// Source: PTX ISA, mma.m16n8k16.
__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four matrices of 8 × 8 from shared memory: lane 8 m + r points to row r of matrix m, 16 bytes on
/// a multiple of 16; of each a lane gets the pair that multiply_add()'s operands want: row g,
/// columns 2 i and 2 i + 1; transposed: rows 2 i and 2 i + 1 of column g.
template <bool kTransposed>
__device__ inline void load_matrices(std::uint32_t (&m)[4], const __nv_bfloat16* row) {
  const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
  }
}

/// Two floats as a pair of bfloat16, `low` in the lower half.
__device__ inline std::uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

}  // namespace moesaic::cuda
