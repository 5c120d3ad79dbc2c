#include "kernels/base/error.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/self_routed.h"
#include "tests/kernels/cuda/device_self_routed.h"
#include "tests/kernels/cuda/self_routed_checks.h"
#include "tests/reference/self_routed.h"

namespace moesaic::cuda {
namespace {

using Layer = kernels::SelfRoutedLayer;
using Options = kernels::SelfRoutedOptions;

// Products of bfloat16 are exact in float32; sums of up to a thousand terms in any order.
constexpr reference::Precision kBf16{.sum = 64 * kEps, .bf16 = true};

class SelfRoutedBatch : public OnDevice {
 protected:
  std::vector<float> run(const Layer& host, const std::vector<float>& x) {
    const DeviceSelfRouted layer(host.view, stream);
    const std::int64_t d_model = host.view.d_model(), n = std::ssize(x) / d_model;
    const DeviceBuffer<std::byte> workspace(self_routed_batch_workspace(layer.view, n));
    const DeviceMatrix in(x, n, d_model, stream), out(n, d_model);
    self_routed_batch(blas, layer.view, in.view(), out.view(), workspace.data(), stream);
    return out.host(stream);
  }
  void expect_layer(const Layer& host, std::int64_t n_tokens) {
    const std::int64_t d_model = host.view.d_model();
    const std::vector<float> x = normal_values(size(n_tokens * d_model), 7);
    const auto expected = reference::self_routed(
        host.view, ConstMatrix(x.data(), n_tokens, d_model), kBf16, kBf16, kBf16);
    const std::vector<float> found = run(host, x);
    ASSERT_EQ(found.size(), expected.y.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_NEAR(found[i], expected.y[i], expected.error[i] + 1e-30) << "element " << i;
    }
    // Few enough that nearly all elements are compared to within float32's rounding.
    EXPECT_LT(expected.n_doubtful, n_tokens * host.view.d_ff() / 200 + 2);
    for (const auto& kept : expected.kept) n_kept += std::ssize(kept);
  }
  static Layer layer(Options o) {
    o.packed = false;
    return Layer(o);
  }

  Blas blas{stream};
  std::int64_t n_kept = 0;  // neurons of all runs' tokens
};

TEST_F(SelfRoutedBatch, EveryDTypeByGateAndByInput) {
  for (const DTypeTraits& t : kDTypes) {
    for (const bool up_by_input : {false, true}) {
      SCOPED_TRACE(testing::Message() << t.name << (up_by_input ? " input" : " gate"));
      Options o{.gate = t.dtype, .up = t.dtype, .down = t.dtype, .up_by_input = up_by_input};
      if (t.block_elems == 256) o.d_model = o.d_ff = 256;
      expect_layer(layer(o), 9);
    }
  }
  EXPECT_GT(n_kept, 9 * 22 * 50);
}

TEST_F(SelfRoutedBatch, Tokens65And200) {
  for (const bool up_by_input : {false, true}) {
    for (const std::int64_t n : {65, 200}) {
      expect_layer(layer({.d_model = 96, .d_ff = 160, .up_by_input = up_by_input}), n);
    }
  }
}

// One of the matrices without columns, or gate and up of two formats.
TEST_F(SelfRoutedBatch, FormatsMayDiffer) {
  for (const bool up_by_input : {false, true}) {
    for (const auto& [gate, up, down] : {std::tuple{DType::Q8_0, DType::BF16, DType::Q4_0},
                                         {DType::Q4_1, DType::Q4_1, DType::Q5_0},
                                         {DType::Q5_1, DType::Q5_1, DType::Q4_1},
                                         {DType::BF16, DType::BF16, DType::Q8_0}}) {
      expect_layer(layer({.gate = gate,
                          .up = up,
                          .down = down,
                          .up_by_input = up_by_input,
                          .phi = kernels::Activation::GeluTanh}),
                   10);
    }
  }
}

// Panels of 64 rows, units of 32 columns, stores of 8: sizes around each.
TEST_F(SelfRoutedBatch, SizesAcrossPanelsAndUnits) {
  for (const auto& [dtype, d_model, d_ff] : {std::tuple{DType::F32, 4, 4},
                                             {DType::F32, 36, 68},
                                             {DType::BF16, 60, 124},
                                             {DType::F16, 132, 64},
                                             {DType::Q8_0, 96, 32},
                                             {DType::Q4_0, 32, 1056},
                                             {DType::Q4_1, 64, 2048}}) {
    for (const bool up_by_input : {false, true}) {
      SCOPED_TRACE(testing::Message() << traits(dtype).name << " " << d_model << " x " << d_ff);
      expect_layer(layer({.gate = dtype,
                          .up = dtype,
                          .down = dtype,
                          .d_model = d_model,
                          .d_ff = d_ff,
                          .up_by_input = up_by_input}),
                   3);
    }
  }
}

TEST_F(SelfRoutedBatch, ThresholdsThatKeepAllOrNothing) {
  const std::vector<float> x = normal_values(3 * 192, 7);
  for (const bool up_by_input : {false, true}) {
    for (const float value : {kInf, kNan}) {
      for (int which = 0; which < 4; ++which) {  // all zero, or one of the three `value`
        Layer host = layer({.up_by_input = up_by_input});
        const std::array<std::vector<float>*, 3> thresholds = {
            &host.input_threshold, &host.gate_threshold, &host.hidden_threshold};
        for (auto* v : thresholds) std::ranges::fill(*v, 0.0f);
        if (which > 0) std::ranges::fill(*thresholds[size(which - 1)], value);
        const auto y = run(host, x);
        const bool nothing = which == 1 || which == 3 || (which == 2 && !up_by_input);
        EXPECT_EQ(std::ranges::all_of(y, [](float v) { return v == 0; }), nothing) << which;
        if (which == 0) expect_layer(host, 3);
      }
    }
  }
}

// What is compared with a threshold is not rounded: x and a u in float32.
TEST_F(SelfRoutedBatch, TiesAreKeptBeforeRounding) {
  expect_ties_kept([&](const Layer& l, const std::vector<float>& x) { return run(l, x); });
}

TEST_F(SelfRoutedBatch, WhatIsNotANumberStaysInItsToken) {
  expect_nan_stays([&](const Layer& l, const std::vector<float>& x) { return run(l, x); });
}

TEST_F(SelfRoutedBatch, NamesTheShapes) {
  const Layer host = layer({});
  const DeviceSelfRouted on(host.view, stream);
  const DeviceMatrix x(1, 192), two(2, 192), narrow(1, 64);
  const DeviceBuffer<std::byte> workspace(self_routed_batch_workspace(on.view, 2));
  const auto expect_thrown = [&](const kernels::SelfRoutedView& view, Matrix in, Matrix out) {
    EXPECT_THROW(self_routed_batch(blas, view, in, out, workspace.data(), stream), ShapeError);
  };
  expect_thrown(on.view, two.view(), x.view());
  expect_thrown(on.view, x.view(), narrow.view());
  kernels::SelfRoutedView wrong = on.view;
  wrong.hidden_threshold = wrong.hidden_threshold.first(319);
  expect_thrown(wrong, x.view(), x.view());
  wrong = on.view;
  wrong.hidden_threshold = {wrong.hidden_threshold.data() + 1, 320};
  expect_thrown(wrong, x.view(), x.view());
  const Matrix many(x.view().data, 65536, 192, 0);
  expect_thrown(on.view, many, many);
}

TEST_F(SelfRoutedBatch, NoTokens) {
  const Layer host = layer({});
  const DeviceSelfRouted on(host.view, stream);
  self_routed_batch(blas, on.view, ConstMatrix(nullptr, 0, 192), Matrix(nullptr, 0, 192), nullptr,
                    stream);
}

}  // namespace
}  // namespace moesaic::cuda
