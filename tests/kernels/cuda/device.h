#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "kernels/base/view.h"
#include "kernels/cuda/base/device_buffer.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// A float matrix in device memory whose rows begin at multiples of 16 bytes.
class DeviceMatrix {
 public:
  DeviceMatrix(std::int64_t rows, std::int64_t cols)
      : rows_(rows), cols_(cols), stride_((cols + 3) / 4 * 4), buffer_(size()) {}
  DeviceMatrix(const std::vector<float>& values, std::int64_t rows, std::int64_t cols,
               const Stream& stream)
      : DeviceMatrix(rows, cols) {
    // What pads a row stays unwritten: a kernel that reads it is found.
    for (std::int64_t r = 0; r < rows; ++r) {
      copy_bytes_in(reinterpret_cast<std::byte*>(buffer_.data() + r * stride_),
                    values.data() + r * cols, static_cast<std::size_t>(cols) * sizeof(float),
                    stream);
    }
    stream.synchronize();
  }

  Matrix view() const { return {buffer_.data(), rows_, cols_, stride_}; }
  std::vector<float> host(const Stream& stream) const {
    std::vector<float> values(static_cast<std::size_t>(rows_ * cols_));
    for (std::int64_t r = 0; r < rows_; ++r) {
      copy_bytes_out(values.data() + r * cols_,
                     reinterpret_cast<const std::byte*>(buffer_.data() + r * stride_),
                     static_cast<std::size_t>(cols_) * sizeof(float), stream);
    }
    stream.synchronize();
    return values;
  }

 private:
  std::size_t size() const { return static_cast<std::size_t>(rows_ * stride_); }

  std::int64_t rows_, cols_, stride_;
  DeviceBuffer<float> buffer_;
};

/// A copy of host values in device memory.
template <class T>
DeviceBuffer<T> on_device(const std::vector<T>& values, const Stream& stream) {
  DeviceBuffer<T> buffer(values.size());
  buffer.copy_from(values, stream);
  stream.synchronize();
  return buffer;
}

template <class T>
std::vector<T> on_host(const DeviceBuffer<T>& buffer, const Stream& stream) {
  std::vector<T> values(buffer.size());
  buffer.copy_to(values, stream);
  stream.synchronize();
  return values;
}

/// Packed weights in device memory.
class DeviceWeights {
 public:
  DeviceWeights() = default;
  DeviceWeights(const WeightView& host, const Stream& stream)
      : buffer_(static_cast<std::size_t>(host.bytes())), view_(host) {
    copy_bytes_in(buffer_.data(), host.data, buffer_.size(), stream);
    stream.synchronize();
    view_.data = buffer_.data();
    view_.panels = nullptr;
  }
  const WeightView& view() const { return view_; }

 private:
  DeviceBuffer<std::byte> buffer_;
  WeightView view_;
};

/// Every test has a stream, and ends with no finding of the stand-in's checkers, if it runs there
/// (docs/cudasim.md); on a device only the results are compared.
class OnDevice : public testing::Test {
 protected:
  void TearDown() override;
  Stream stream;
};

}  // namespace moesaic::cuda
