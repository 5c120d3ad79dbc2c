#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "tests/cudasim/runtime/hooks.h"

namespace cudasim::test {

inline void check(cudaError_t e) { ASSERT_EQ(e, cudaSuccess) << cudaGetErrorString(e); }

/// Device memory that is freed with the object.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t n) : n_(n) { check(cudaMalloc(&data_, n * sizeof(T))); }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    check(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  operator T*() const { return data_; }
  T* get() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(n_);
    check(cudaMemcpy(values.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  std::size_t n_;
};

inline std::vector<float> normal(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> d;
  std::vector<float> v(n);
  for (float& x : v) x = d(random);
  return v;
}

/// The oldest report, forgotten; empty if there is none.
inline std::string take_report() {
  cudaDeviceSynchronize();
  char text[4096] = "";
  cudasim_take_report(text, sizeof text);
  return text;
}

/// Every test ends with no report left, and leaves none to the next.
class OnDevice : public testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(take_report(), "");
    while (!take_report().empty()) {
    }
  }
};

}  // namespace cudasim::test
