#include "converter/recovery/block_scales.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "converter/recovery/arithmetic.h"
#include "kernels/base/error.h"
#include "kernels/quant.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kBlock = 32;

bool has_offset(DType dtype) { return dtype == DType::Q4_1 || dtype == DType::Q5_1; }

// A block begins with its scale, and its minimum where it has one, in float16.
float load_half(const std::byte* from) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  return kernels::f16_to_f32(bits);
}

void store_half(float value, std::byte* to) {
  const std::uint16_t bits = kernels::f32_to_f16(value);
  std::memcpy(to, &bits, sizeof bits);
}

}  // namespace

bool BlockScales::can_tune(DType dtype) {
  return dtype == DType::Q4_0 || dtype == DType::Q5_0 || dtype == DType::Q8_0 || has_offset(dtype);
}

BlockScales::BlockScales(const WeightView& w)
    : dtype_(w.dtype),
      rows_(w.rows),
      cols_(w.cols),
      blocks_(static_cast<std::size_t>(w.rows * row_bytes(w.dtype, w.cols))),
      code_(static_cast<std::size_t>(w.rows * w.cols)),
      scale_(static_cast<std::size_t>(w.rows * w.cols / kBlock)),
      offset_(has_offset(w.dtype) ? scale_.size() : 0),
      scale_gradient_(scale_.size()),
      offset_gradient_(offset_.size()) {
  require<ShapeError>(can_tune(dtype_), "{} has no scales of blocks to tune", traits(dtype_).name);
  const auto bytes = static_cast<std::size_t>(traits(dtype_).block_bytes);
  const auto row = static_cast<std::size_t>(row_bytes(dtype_, cols_));
  for (std::int64_t r = 0; r < rows_; ++r) {
    std::memcpy(blocks_.data() + static_cast<std::size_t>(r) * row, w.row(r), row);
  }
  std::array<std::byte, 64> block;
  std::array<float, kBlock> values;
  for (std::size_t b = 0; b < scale_.size(); ++b) {
    std::memcpy(block.data(), blocks_.data() + b * bytes, bytes);
    scale_[b] = load_half(block.data());
    if (!offset_.empty()) offset_[b] = load_half(block.data() + 2);
    // With scale 1 and minimum 0 the values are the codes.
    store_half(1, block.data());
    if (!offset_.empty()) store_half(0, block.data() + 2);
    kernels::dequantize_row(dtype_, block.data(), values);
    std::transform(values.begin(), values.end(),
                   code_.begin() + static_cast<std::ptrdiff_t>(b) * kBlock,
                   [](float v) { return static_cast<std::int8_t>(v); });
  }
}

void BlockScales::gather(Context& ctx, ConstMatrix gradient) {
  const std::int64_t per_row = cols_ / kBlock;
  for_each_row(ctx, rows_, [&](std::int64_t r, int) {
    const std::int8_t* code = code_.data() + r * cols_;
    const float* g = gradient.row(r);
    for (std::int64_t b = 0; b < per_row; ++b, code += kBlock, g += kBlock) {
      float scale = 0, offset = 0;
      for (std::int64_t i = 0; i < kBlock; ++i) {
        scale += static_cast<float>(code[i]) * g[i];
        offset += g[i];
      }
      const auto at = static_cast<std::size_t>(r * per_row + b);
      scale_gradient_[at] = scale;
      if (!offset_.empty()) offset_gradient_[at] = offset;
    }
  });
}

void BlockScales::scatter(Context& ctx, Matrix value) const {
  const std::int64_t per_row = cols_ / kBlock;
  for_each_row(ctx, rows_, [&](std::int64_t r, int) {
    const std::int8_t* code = code_.data() + r * cols_;
    float* w = value.row(r);
    for (std::int64_t b = 0; b < per_row; ++b, code += kBlock, w += kBlock) {
      const auto at = static_cast<std::size_t>(r * per_row + b);
      const float offset = offset_.empty() ? 0 : offset_[at];
      for (std::int64_t i = 0; i < kBlock; ++i) {
        w[i] = scale_[at] * static_cast<float>(code[i]) + offset;
      }
    }
  });
}

AlignedBuffer<std::byte> BlockScales::packed() const {
  AlignedBuffer<std::byte> out(blocks_.size());
  std::copy(blocks_.begin(), blocks_.end(), out.begin());
  const auto bytes = static_cast<std::size_t>(traits(dtype_).block_bytes);
  for (std::size_t b = 0; b < scale_.size(); ++b) {
    store_half(scale_[b], out.data() + b * bytes);
    if (!offset_.empty()) store_half(offset_[b], out.data() + b * bytes + 2);
  }
  return out;
}

}  // namespace moesaic::converter
