#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/base/dtype.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// dst[i] = value of element i of a packed row; bit for bit what ggml's reference dequantisation
/// gives (products and sums rounded to float32 one by one, no fused multiply-add). dst.size() a
/// multiple of the block size. src holds row_bytes(dtype, dst.size()) bytes. Throws ShapeError.
/// Source: ggml-quants (GGUF block formats).
void dequantize_row(DType dtype, const std::byte* src, std::span<float> dst);

/// The same, rounded to bfloat16 (nearest even); dst holds raw bfloat16 bits.
void dequantize_row_bf16(DType dtype, const std::byte* src, std::span<std::uint16_t> dst);

/// Packs a row: per block the scale (and minimum) that come out best in squared error among the
/// candidates tried, weighted by `importance` (one value per element; empty = 1 everywhere). For
/// F32, F16, BF16: rounding to nearest even. Supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0,
/// Q5_1; throws FormatError for the K formats (read only), ShapeError if src.size() is no multiple
/// of the block size.
void quantize_row(DType dtype, std::span<const float> src, std::byte* dst,
                  std::span<const float> importance = {});

/// True if quantize_row can write this dtype.
bool can_quantize(DType dtype);

float bf16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_bf16(float value);  // nearest even; NaN stays NaN
float f16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_f16(float value);  // nearest even

}  // namespace moesaic::kernels
