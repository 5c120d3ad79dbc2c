#pragma once

#include <cstddef>
#include <cstdint>

namespace moesaic::kernels {

/// One product of a matrix multiplication on the calling thread, row-major:
/// C = alpha op(A) op(B), or C += alpha op(A) op(B).   op(A) [m, k], op(B) [k, n], C [m, n]; ld*
/// are the elements from one stored row to the next. m, n, k >= 1.
struct Gemm {
  bool trans_a = false;
  bool trans_b = false;
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  std::int64_t lda = 0;
  std::int64_t ldb = 0;
  std::int64_t ldc = 0;
  float alpha = 1;
  bool accumulate = false;
};

/// dst[i] = the raw bfloat16 of src[i], nearest even.
void to_bf16_bits(const float* src, std::size_t n, std::uint16_t* dst);

/// Runs it in float32. Throws Error if oneDNN refuses.
void gemm_f32(const Gemm& g, const float* a, const float* b, float* c);

/// Runs it on raw bfloat16 operands with float32 sums; on a machine where oneDNN has no bfloat16,
/// on the same values in float32. Throws Error if oneDNN refuses.
void gemm_bf16(const Gemm& g, const std::uint16_t* a, const std::uint16_t* b, float* c);

}  // namespace moesaic::kernels
