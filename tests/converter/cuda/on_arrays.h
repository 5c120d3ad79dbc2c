#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "converter/recovery/arithmetic.h"
#include "kernels/quant.h"
#include "tests/kernels/cuda/device.h"

namespace moesaic::converter {

using Bits = std::vector<std::uint16_t>;  // of bfloat16

inline constexpr double kBf16Eps = 1.0 / 256;  // between two neighbours, relative

inline double value_of(std::uint16_t bits) { return kernels::bf16_to_f32(bits); }

inline Bits rounded(const std::vector<float>& v) {
  Bits bits(v.size());
  to_operand(v.data(), std::ssize(v), bits.data());
  return bits;
}

/// Operations on whole arrays in device memory.
class OnArrays : public cuda::OnDevice {
 protected:
  template <class T>
  cuda::DeviceBuffer<T> put(const std::vector<T>& v) {
    return cuda::on_device(v, stream);
  }
  template <class T>
  std::vector<T> get(const cuda::DeviceBuffer<T>& b) {
    return cuda::on_host(b, stream);
  }
  template <class T>
  static MatrixView<T> all(const cuda::DeviceBuffer<T>& b, std::int64_t rows, std::int64_t cols) {
    return {b.data(), rows, cols};
  }
  /// Of a part of an arena.
  template <class T>
  std::vector<T> host(std::span<const T> device) {
    std::vector<T> values(device.size());
    cuda::copy_bytes_out(values.data(), reinterpret_cast<const std::byte*>(device.data()),
                         device.size_bytes(), stream);
    stream.synchronize();
    return values;
  }
};

}  // namespace moesaic::converter
