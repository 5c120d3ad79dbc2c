#include "kernels/base/error.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rope.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic::cuda {
namespace {

struct Shape {
  std::int64_t rows, cols;
};

class Elementwise : public OnDevice {
 protected:
  std::vector<float> values(const Shape& s, unsigned seed) {
    return normal_values(size(s.rows * s.cols), seed);
  }
  DeviceMatrix put(const std::vector<float>& v, const Shape& s) {
    return {v, s.rows, s.cols, stream};
  }
};

// One element, one warp and its neighbours, more than a block; none.
constexpr Shape kShapes[] = {{1, 1}, {3, 31}, {2, 33}, {1, 576}, {5, 577}, {2, 1030}, {0, 8}};

TEST_F(Elementwise, RmsNorm) {
  for (const Shape& s : kShapes) {
    const auto x = values(s, 1), w = normal_values(size(s.cols), 2);
    const auto expected = reference::rms_norm({x.data(), s.rows, s.cols}, w, 1e-5f);
    const auto device_w = on_device(w, stream);
    const DeviceMatrix in = put(x, s), out(s.rows, s.cols);
    rms_norm(in.view(), device_w.data(), 1e-5f, out.view(), stream);
    const auto y = out.host(stream);
    rms_norm(in.view(), device_w.data(), 1e-5f, in.view(), stream);
    EXPECT_EQ(in.host(stream), y) << "in place";
    for (std::size_t i = 0; i < y.size(); ++i) {
      EXPECT_NEAR(y[i], expected[i], 8 * kEps * std::fabs(expected[i])) << s.cols;
    }
  }
}

TEST_F(Elementwise, RmsNormOfZerosAndNan) {
  const std::vector<float> x = {0, 0, 0, 1, kNan, 3}, w = {1, 2, 3};
  const auto device_w = on_device(w, stream);
  const DeviceMatrix in = put(x, {2, 3}), out(2, 3);
  rms_norm(in.view(), device_w.data(), 1e-6f, out.view(), stream);
  const auto y = out.host(stream);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(y[static_cast<std::size_t>(i)], 0);
    EXPECT_TRUE(std::isnan(y[static_cast<std::size_t>(3 + i)]));
  }
}

TEST_F(Elementwise, AddAndNormEqualAddThenNorm) {
  for (const Shape& s : kShapes) {
    const auto x = values(s, 3), r = values(s, 4), w = normal_values(size(s.cols), 5);
    const auto device_w = on_device(w, stream);
    const DeviceMatrix residual = put(r, s), fused = put(x, s), apart = put(x, s);
    const DeviceMatrix fused_y(s.rows, s.cols), apart_y(s.rows, s.cols);
    add_rms_norm(fused.view(), residual.view(), device_w.data(), 1e-5f, fused_y.view(), stream);
    add(residual.view(), apart.view(), stream);
    rms_norm(apart.view(), device_w.data(), 1e-5f, apart_y.view(), stream);
    const auto sum = apart.host(stream);
    for (std::size_t i = 0; i < sum.size(); ++i) EXPECT_EQ(sum[i], x[i] + r[i]);
    EXPECT_EQ(fused.host(stream), sum);
    EXPECT_EQ(fused_y.host(stream), apart_y.host(stream));
  }
}

TEST_F(Elementwise, GatedActivation) {
  for (const auto phi : {kernels::Activation::Silu, kernels::Activation::GeluTanh}) {
    for (const Shape& s : kShapes) {
      auto gate = values(s, 6);
      for (std::size_t i = 0; i < gate.size(); i += 3) gate[i] *= 10;
      const auto up = values(s, 7);
      const DeviceMatrix g = put(gate, s), u = put(up, s);
      gated_activation(phi, g.view(), u.view(), g.view(), stream);
      const auto h = g.host(stream);
      for (std::size_t i = 0; i < h.size(); ++i) {
        const double expected = reference::activate(phi, gate[i]) * up[i];
        // The exponent's error, |z| ε, is that of the result relative to its size.
        EXPECT_NEAR(h[i], expected,
                    (8 + 4 * std::fabs(gate[i]) + std::pow(std::fabs(gate[i]), 3)) * kEps *
                            std::fabs(expected) +
                        1e-37);
      }
    }
  }
}

TEST_F(Elementwise, ActivationOfExtremes) {
  const std::vector<float> gate = {kInf, -kInf, kNan, 1e30f, -1e30f, 0, -0.0f, -100};
  const std::vector<float> up(gate.size(), 1);
  for (const auto phi : {kernels::Activation::Silu, kernels::Activation::GeluTanh}) {
    const DeviceMatrix g = put(gate, {1, 8}), u = put(up, {1, 8}), out(1, 8);
    gated_activation(phi, g.view(), u.view(), out.view(), stream);
    const auto h = out.host(stream);
    for (std::size_t i = 0; i < h.size(); ++i) {
      const float expected = kernels::activate(phi, gate[i]);
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(h[i])) << gate[i];
      } else {
        EXPECT_EQ(h[i] + 0.0f, expected + 0.0f) << gate[i];
      }
    }
  }
}

TEST_F(Elementwise, Rope) {
  const std::vector<std::int32_t> positions = {0, 1, 511, 8191, 200000};
  for (const auto style : {kernels::RopeStyle::Interleaved, kernels::RopeStyle::Halves}) {
    for (const int head_dim : {2, 64, 80}) {
      const Shape s{5, 3 * head_dim};
      const auto x = values(s, 8);
      const auto freq = kernels::rope_frequencies(head_dim, 10000);
      const auto expected =
          reference::rope({x.data(), s.rows, s.cols}, head_dim, positions, freq, style);
      const DeviceMatrix m = put(x, s);
      const auto p = on_device(positions, stream);
      const auto f = on_device(freq, stream);
      rope(m.view(), head_dim, p.data(), f.data(), style, stream);
      const auto y = m.host(stream);
      for (std::size_t i = 0; i < y.size(); ++i) EXPECT_NEAR(y[i], expected[i], 4e-6);
    }
  }
}

TEST_F(Elementwise, NamesTheShapes) {
  const DeviceMatrix a(2, 3), b(2, 4);
  EXPECT_THROW(rms_norm(a.view(), nullptr, 0, b.view(), stream), ShapeError);
  EXPECT_THROW(add(a.view(), b.view(), stream), ShapeError);
  EXPECT_THROW(add_rms_norm(a.view(), b.view(), nullptr, 0, a.view(), stream), ShapeError);
  EXPECT_THROW(rope(a.view(), 2, nullptr, nullptr, kernels::RopeStyle::Halves, stream), ShapeError);
  EXPECT_THROW(gated_activation(kernels::Activation::Silu, a.view(), a.view(), b.view(), stream),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
