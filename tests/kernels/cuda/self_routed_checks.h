#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/kernels/self_routed_layer.h"
#include "tests/kernels/support.h"

namespace moesaic::cuda {

// What holds for a token and for a batch, run(layer, x) giving the layer's output; layers without
// packed parts, so that their views are the file's rows.

/// What equals its threshold is kept, what is one float below it is not.
template <class Run>
void expect_ties_kept(Run&& run) {
  for (const bool above : {false, true}) {
    kernels::SelfRoutedOptions options{.gate = DType::F32, .up = DType::F32, .down = DType::F32};
    options.packed = false;
    kernels::SelfRoutedLayer host(options);
    const auto next = [&](float v) { return above ? std::nextafter(v, kInf) : v; };
    std::ranges::fill(host.gate_threshold, 0.0f);
    std::ranges::fill(host.hidden_threshold, 0.0f);
    const std::vector<float> x = normal_values(192, 7);
    for (std::size_t j = 0; j < 192; ++j) host.input_threshold[j] = next(std::fabs(x[j]));
    const auto y = run(host, x);
    EXPECT_EQ(std::ranges::all_of(y, [](float v) { return v == 0; }), above);
  }
}

/// A NaN in one token of three changes no other.
template <class Run>
void expect_nan_stays(Run&& run) {
  for (const bool up_by_input : {false, true}) {
    for (const DType dtype : {DType::Q4_1, DType::BF16, DType::Q5_1}) {
      kernels::SelfRoutedOptions options{
          .gate = dtype, .up = dtype, .down = dtype, .up_by_input = up_by_input};
      options.packed = false;
      const kernels::SelfRoutedLayer host(options);
      const std::vector<float> good = normal_values(3 * 192, 7);
      std::vector<float> x = good, zeroed = good;
      x[192 + 40] = kNan;
      zeroed[192 + 40] = 0;
      const auto found = run(host, x), clean = run(host, good), without = run(host, zeroed);
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (i / 192 != 1) {
          EXPECT_EQ(found[i], clean[i]);
        } else {  // NaN is no large input; a neuron whose up sum is NaN is not kept
          EXPECT_EQ(found[i], up_by_input ? without[i] : 0.0f);
        }
      }
    }
  }
}

}  // namespace moesaic::cuda
