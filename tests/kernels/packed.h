#pragma once

#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/quant.h"

namespace moesaic {

/// Random packed weights and their view.
class Packed {
 public:
  Packed() = default;
  Packed(DType dtype, std::int64_t rows, std::int64_t cols, unsigned seed, float scale = 1)
      : bytes_(static_cast<std::size_t>(rows * row_bytes(dtype, cols))),
        view_{bytes_.data(), dtype, rows, cols} {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, scale);
    if (kernels::can_quantize(dtype)) {
      std::vector<float> row(static_cast<std::size_t>(cols));
      for (std::int64_t r = 0; r < rows; ++r) {
        for (float& v : row) v = normal(random);
        kernels::quantize_row(dtype, row, bytes_.data() + r * view_.row_bytes());
      }
      return;
    }
    // The K formats are read only: any bits make a block as long as its float16 scales are finite.
    for (std::byte& b : bytes_) b = static_cast<std::byte>(random());
    const auto block = static_cast<std::size_t>(traits(dtype).block_bytes);
    for (std::size_t first = 0; first < bytes_.size(); first += block) {
      const std::size_t at[2] = {dtype == DType::Q6_K ? block - 2 : 0,
                                 dtype == DType::Q6_K ? block - 2 : 2};
      for (const std::size_t offset : at) {
        const std::uint16_t bits = kernels::f32_to_f16(scale * normal(random) / 64);
        std::memcpy(bytes_.data() + first + offset, &bits, sizeof(bits));
      }
    }
  }

  const WeightView& view() const { return view_; }

 private:
  AlignedBuffer<std::byte> bytes_;
  WeightView view_;
};

}  // namespace moesaic
