// Operations of a training on a GPU, against the CPU's (which are held against finite differences
// and PyTorch) or obvious loops in double.

#include <algorithm>
#include <array>
#include <bit>

#include "converter/adam.h"
#include "converter/recovery/arithmetic.h"
#include "converter/recovery/attention.h"
#include "converter/recovery/block_scales.h"
#include "converter/recovery/norm.h"
#include "kernels/base/error.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/training/adam.h"
#include "kernels/cuda/training/block_scales.h"
#include "kernels/cuda/training/divergence.h"
#include "kernels/cuda/training/elementwise.h"
#include "kernels/cuda/training/gated_mlp.h"
#include "kernels/cuda/training/window_attention.h"
#include "kernels/quant.h"
#include "tests/converter/cuda/on_arrays.h"
#include "tests/kernels/support.h"

namespace moesaic::converter {
namespace {

class CudaTrainingOps : public OnArrays {
 protected:
  Lender lender;
};

TEST_F(CudaTrainingOps, OperandsAreRoundedAsTheCpus) {
  for (const int n : {0, 1, 255, 1000}) {
    auto v = normal_values(size(n), 1);
    if (n > 20) v[3] = kInf, v[4] = -kInf, v[5] = 1e-40f, v[6] = std::bit_cast<float>(0x3f808000u);
    const auto from = put(v);
    const cuda::DeviceBuffer<std::uint16_t> to(v.size());
    cuda::to_bf16(from.data(), n, to.data(), stream);
    EXPECT_EQ(get(to), rounded(v));
    const cuda::DeviceBuffer<float> same(v.size());
    cuda::copy(from.data(), n, same.data(), stream);
    EXPECT_EQ(get(same), v);
  }
}

// All four ways to read two operands, one row and what is no multiple of anything.
TEST_F(CudaTrainingOps, Products) {
  struct Shape {
    std::int64_t m, n, k;
  };
  { const cuda::Blas first(stream); }  // handles come and go
  cuda::Blas blas(stream);
  for (const Shape& s : {Shape{1, 1, 1}, {1, 33, 7}, {13, 5, 64}}) {
    for (int way = 0; way < 4; ++way) {
      const bool ta = way & 1, tb = way & 2;
      const Bits a = rounded(normal_values(size(s.m * s.k), 1)),
                 b = rounded(normal_values(size(s.n * s.k), 2));
      const auto before = normal_values(size(s.m * s.n), 3);
      const auto da = put(a), db = put(b);
      const auto dc = put(before), fresh = cuda::DeviceBuffer<float>(before.size());
      const auto view = [](const auto& m, bool t, std::int64_t rows, std::int64_t cols) {
        return cuda::Bf16Matrix(m.data(), t ? cols : rows, t ? rows : cols);
      };
      const auto va = view(da, ta, s.m, s.k), vb = view(db, tb, s.k, s.n);
      blas.multiply(ta, tb, va, vb, true, all(dc, s.m, s.n));
      blas.multiply(ta, tb, va, vb, false, all(fresh, s.m, s.n));
      const auto sum = get(dc), product = get(fresh);
      for (std::int64_t i = 0; i < s.m; ++i) {
        for (std::int64_t j = 0; j < s.n; ++j) {
          double expected = 0, norm = 0;
          for (std::int64_t l = 0; l < s.k; ++l) {
            const double term = value_of(a[size(ta ? l * s.m + i : i * s.k + l)]) *
                                value_of(b[size(tb ? j * s.k + l : l * s.n + j)]);
            expected += term;
            norm += std::fabs(term);
          }
          const std::size_t at = size(i * s.n + j);
          const double tolerance =
              static_cast<double>(s.k + 2) * kEps * (norm + std::fabs(before[at]));
          EXPECT_NEAR(product[at], expected, tolerance) << way;
          EXPECT_NEAR(sum[at], expected + before[at], tolerance) << way;
        }
      }
    }
  }
  const cuda::DeviceBuffer<std::uint16_t> a(6), b(8);
  const cuda::DeviceBuffer<float> c(6);
  EXPECT_THROW(blas.multiply(false, false, all(a, 2, 3), all(b, 4, 2), false, all(c, 2, 2)),
               ShapeError);
  EXPECT_THROW(blas.multiply(false, true, all(a, 2, 3), all(a, 2, 3), false, all(c, 2, 3)),
               ShapeError);
}

TEST_F(CudaTrainingOps, NormBackward) {
  for (const std::int64_t rows : {1, 3, 9}) {
    for (const std::int64_t d : {1, 31, 64, 577}) {
      const auto x = normal_values(size(rows * d), 1), dy = normal_values(size(rows * d), 2);
      const auto before = normal_values(size(rows * d), 3), w = normal_values(size(d), 4);
      std::vector<double> expected(x.size());
      const std::vector<double> x64(x.begin(), x.end()), dy64(dy.begin(), dy.end()),
          w64(w.begin(), w.end());
      norm_backward<double>(lender.ctx, {x64.data(), rows, d}, w64, 0.1, {dy64.data(), rows, d},
                            false, {expected.data(), rows, d});
      const auto dx_x = put(x), d_dy = put(dy), d_w = put(w), sum = put(before);
      const auto run = [&](bool accumulate, const cuda::DeviceBuffer<float>& to) {
        cuda::rms_norm_backward(all(dx_x, rows, d), d_w.data(), 0.1F, all(d_dy, rows, d),
                                accumulate, all(to, rows, d), stream);
      };
      run(true, sum);
      run(false, d_dy);  // in the place of dy
      const auto added = get(sum), dx = get(d_dy);
      for (std::size_t i = 0; i < dx.size(); ++i) {
        const double tolerance = (20 + std::sqrt(d)) * kEps * (1 + std::fabs(expected[i]) * 4);
        EXPECT_NEAR(dx[i], expected[i], tolerance) << d;
        EXPECT_NEAR(added[i], expected[i] + before[i], tolerance + kEps * std::fabs(before[i]));
      }
    }
  }
}

struct WindowCase {
  const char* name;
  int n_heads, n_kv_heads, head_dim;
  std::int64_t window, n_ctx, n_windows;
};

class CudaTrainingAttention : public CudaTrainingOps,
                              public testing::WithParamInterface<WindowCase> {};

TEST_P(CudaTrainingAttention, ForwardAndBackward) {
  const WindowCase& c = GetParam();
  const std::int64_t n = c.n_ctx * c.n_windows, q_cols = std::int64_t{c.n_heads} * c.head_dim;
  const std::int64_t kv_cols = std::int64_t{c.n_kv_heads} * c.head_dim;
  const auto values = [&](std::int64_t cols, unsigned seed) {
    return normal_values(size(n * cols), seed);
  };
  const auto q = values(q_cols, 1), k = values(kv_cols, 2), v = values(kv_cols, 3);
  const auto d_out = values(q_cols, 4);
  const AttentionShape shape{c.n_heads, c.n_kv_heads, c.head_dim, 0.3, c.window, c.n_ctx};
  struct Exact {
    Exact(const std::vector<float>& from, std::int64_t rows)
        : data(from.begin(), from.end()), rows(rows) {}
    MatrixView<double> view() { return {data.data(), rows, std::ssize(data) / rows}; }
    MatrixView<const double> constant() const {
      return {data.data(), rows, std::ssize(data) / rows};
    }
    std::vector<double> data;
    std::int64_t rows;
  };
  const Exact eq(q, n), ek(k, n), ev(v, n), ed(d_out, n);
  Exact out(q, n), lse(values(c.n_heads, 5), n), dq(q, n), dk(k, n), dv(v, n);
  attention_forward<double>(lender.ctx, shape, eq.constant(), ek.constant(), ev.constant(),
                            out.view(), lse.view());
  attention_backward<double>(lender.ctx, shape, eq.constant(), ek.constant(), ev.constant(),
                             out.constant(), lse.constant(), ed.constant(), dq.view(), dk.view(),
                             dv.view());
  cuda::Blas blas(stream);
  const cuda::WindowShape window{c.n_heads, c.n_kv_heads, c.head_dim, 0.3F, c.window, c.n_ctx};
  const cuda::DeviceBuffer<float> workspace(cuda::window_attention_workspace(window));
  const auto bq = put(q), bk = put(k), bv = put(v), bd = put(d_out);
  const cuda::DeviceBuffer<float> o(q.size()), l(lse.data.size()), gq(q.size()), gk(k.size()),
      gv(v.size());
  const std::span<float> scratch(workspace.data(), workspace.size());
  cuda::window_attention(blas, window, all(bq, n, q_cols), all(bk, n, kv_cols), all(bv, n, kv_cols),
                         all(o, n, q_cols), all(l, n, c.n_heads), scratch, stream);
  cuda::window_attention_backward(blas, window, all(bq, n, q_cols), all(bk, n, kv_cols),
                                  all(bv, n, kv_cols), all(o, n, q_cols), all(l, n, c.n_heads),
                                  all(bd, n, q_cols), all(gq, n, q_cols), all(gk, n, kv_cols),
                                  all(gv, n, kv_cols), scratch, stream);
  const auto expect = [&](const cuda::DeviceBuffer<float>& found, const Exact& expected,
                          const char* what) {
    const auto f = get(found);
    double largest = 1;
    for (const double e : expected.data) largest = std::max(largest, std::fabs(e));
    for (std::size_t i = 0; i < f.size(); ++i) {
      ASSERT_NEAR(f[i], expected.data[i], 200 * kEps * largest) << what << " " << i;
    }
  };
  expect(o, out, "out");
  expect(l, lse, "lse");
  expect(gq, dq, "dq");
  expect(gk, dk, "dk");
  expect(gv, dv, "dv");
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaTrainingAttention,
                         testing::Values(WindowCase{"OneRow", 1, 1, 4, 0, 1, 2},
                                         WindowCase{"Grouped", 6, 2, 10, 0, 7, 2},
                                         WindowCase{"Sliding", 2, 2, 16, 5, 37, 1},
                                         WindowCase{"WindowOfOne", 2, 1, 8, 1, 9, 1},
                                         WindowCase{"WiderThanTheText", 3, 1, 6, 40, 35, 1}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_F(CudaTrainingOps, AttentionNamesTheShapes) {
  cuda::Blas blas(stream);
  const cuda::DeviceBuffer<float> m(64), workspace(64);
  const std::span<float> scratch(workspace.data(), workspace.size());
  const auto run = [&](const cuda::WindowShape& s, std::int64_t rows, std::span<float> memory) {
    const auto a = all(m, rows, 4), b = all(m, rows, 2);
    cuda::window_attention(blas, s, a, b, b, a, b, memory, stream);
  };
  EXPECT_THROW(run({2, 1, 2, 1, 0, 4}, 6, scratch), ShapeError);            // no whole windows
  EXPECT_THROW(run({2, 3, 2, 1, 0, 4}, 4, scratch), ShapeError);            // heads
  EXPECT_THROW(run({4, 1, 2, 1, 0, 4}, 4, scratch), ShapeError);            // columns
  EXPECT_THROW(run({2, 1, 2, 1, 0, 4}, 4, scratch.first(63)), ShapeError);  // workspace
}

TEST_F(CudaTrainingOps, InputsAreKept) {
  for (const std::int64_t rows : {1, 5}) {
    for (const std::int64_t d : {1, 33, 300}) {
      const auto x = normal_values(size(rows * d), 1);
      auto threshold = normal_values(size(d), 2);
      for (float& t : threshold) t = std::fabs(t);
      threshold[0] = std::fabs(x[0]) / 2;  // kept where they are equal
      const auto dx = put(x), dt = put(threshold);
      const cuda::DeviceBuffer<std::uint16_t> kept_all(x.size()), large(x.size());
      const cuda::DeviceBuffer<std::uint8_t> mask(x.size());
      const auto count = put(std::vector<cuda::Count>{5});
      cuda::keep_large(all(dx, rows, d), {dt.data(), 2}, kept_all.data(), large.data(), mask.data(),
                       count.data(), stream);
      const auto bits = rounded(x), found = get(large);
      const auto found_mask = get(mask);
      EXPECT_EQ(get(kept_all), bits);
      cuda::Count expected = 5;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const bool keep = std::fabs(x[i]) >= 2 * threshold[i % size(d)];
        expected += keep;
        EXPECT_EQ(found_mask[i], keep);
        EXPECT_EQ(found[i], keep ? bits[i] : 0);
      }
      EXPECT_TRUE(found_mask[0]);
      EXPECT_EQ(get(count)[0], expected);
      // The gradient of what was left out.
      const auto gradient = put(x);
      cuda::mask_gradient(mask.data(), rows * d, gradient.data(), stream);
      const auto masked = get(gradient);
      for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(masked[i], found_mask[i] ? x[i] : 0.0f);
    }
  }
}

TEST_F(CudaTrainingOps, NeuronsAreKeptWithTheirSlopes) {
  for (const auto phi : {kernels::Activation::Silu, kernels::Activation::GeluTanh}) {
    for (const bool by_gate : {true, false}) {
      for (const bool dense : {true, false}) {
        const std::int64_t rows = 5, n = 67;
        auto gate = normal_values(size(rows * n), 1, 2);
        gate[1] = 150, gate[2] = -150, gate[3] = 1e30f, gate[4] = -1e30f, gate[5] = 0;
        const auto up = normal_values(gate.size(), 2);
        std::vector<float> gate_threshold(size(n)), hidden_threshold(size(n));
        for (std::size_t i = 0; i < size(n); ++i) {
          gate_threshold[i] = 0.3f + 0.01f * static_cast<float>(i);
          hidden_threshold[i] = 0.2f + 0.01f * static_cast<float>(i);
        }
        std::vector<double> a(gate.size()), slope(gate.size());
        std::vector<double> exact(gate.begin(), gate.end());
        for (double& v : exact) v = std::clamp(v, -1e4, 1e30);
        activation_slope(phi, exact.data(), std::ssize(a), a.data(), slope.data());
        const auto dg = put(gate), du = put(up), dt = put(gate_threshold),
                   dh = put(hidden_threshold);
        const cuda::DeviceBuffer<std::uint16_t> h(gate.size()), slope_gate(gate.size()),
            slope_up(gate.size());
        const auto counts = put(std::vector<cuda::Count>{1, 2});
        const float factor = 0.75f;
        cuda::keep_neurons(
            phi, all(dg, rows, n), all(du, rows, n),
            by_gate && !dense ? cuda::Threshold{dt.data(), factor} : cuda::Threshold{},
            dense ? cuda::Threshold{} : cuda::Threshold{dh.data(), factor}, h.data(),
            slope_gate.data(), slope_up.data(), dense ? nullptr : counts.data(), stream);
        const auto fh = get(h), fg = get(slope_gate), fu = get(slope_up);
        const auto counted = get(counts);
        cuda::Count routed = 1, kept = 2;
        for (std::size_t i = 0; i < gate.size(); ++i) {
          const double product = a[i] * up[i];
          const bool route =
              dense || !by_gate || std::fabs(a[i]) >= gate_threshold[i % size(n)] * factor;
          const bool keep =
              route && (dense || std::fabs(product) >= hidden_threshold[i % size(n)] * factor);
          routed += route;
          kept += keep;
          const auto near = [&](std::uint16_t found, double expected) {
            if (!keep) expected = 0;
            EXPECT_NEAR(value_of(found), expected, kBf16Eps * std::fabs(expected) + 1e-6)
                << "gate " << gate[i] << " up " << up[i];
          };
          near(fh[i], product);
          near(fg[i], slope[i] * up[i]);
          near(fu[i], a[i]);
        }
        if (dense) routed = 1, kept = 2;
        EXPECT_EQ(counted, (std::vector<cuda::Count>{routed, kept}));
        // Slopes become gradients.
        const auto d_h = normal_values(gate.size(), 3);
        const auto back = put(d_h);
        cuda::scale_slopes(back.data(), rows * n, slope_gate.data(), slope_up.data(), stream);
        const auto gg = get(slope_gate), gu = get(slope_up);
        for (std::size_t i = 0; i < gate.size(); ++i) {
          EXPECT_EQ(gg[i], rounded({static_cast<float>(value_of(fg[i])) * d_h[i]})[0]);
          EXPECT_EQ(gu[i], rounded({static_cast<float>(value_of(fu[i])) * d_h[i]})[0]);
        }
      }
    }
  }
}

TEST_F(CudaTrainingOps, DivergenceAndItsGradient) {
  for (const std::int64_t vocab : {1, 2, 255, 1000}) {
    const std::int64_t rows = 3;
    auto p = normal_values(size(rows * vocab), 1, 3), q = normal_values(size(rows * vocab), 2, 3);
    for (std::int64_t i = 0; i < vocab; ++i) {
      p[size(vocab + i)] += 1000;                       // large logits
      q[size(2 * vocab + i)] = p[size(2 * vocab + i)];  // equal models
    }
    const float unit = 0.25f;
    const auto dp = put(p), dq = put(q);
    const cuda::DeviceBuffer<double> by_row(size(rows)), alone(size(rows));
    const cuda::DeviceBuffer<std::uint16_t> gradient(p.size());
    cuda::kl_divergence(all(dp, rows, vocab), all(dq, rows, vocab), unit, by_row.data(),
                        gradient.data(), stream);
    cuda::kl_divergence(all(dp, rows, vocab), all(dq, rows, vocab), unit, alone.data(), nullptr,
                        stream);
    const auto total = put(std::vector<double>{1.5});
    cuda::add_up(by_row.data(), rows, total.data(), stream);
    const auto found = get(by_row);
    EXPECT_EQ(get(alone), found);
    EXPECT_NEAR(get(total)[0], 1.5 + found[0] + found[1] + found[2], 1e-12);
    const auto slopes = get(gradient);
    for (std::int64_t t = 0; t < rows; ++t) {
      const float *a = p.data() + t * vocab, *b = q.data() + t * vocab;
      const double pm = *std::max_element(a, a + vocab), qm = *std::max_element(b, b + vocab);
      double ps = 0, qs = 0, kl = 0;
      for (std::int64_t i = 0; i < vocab; ++i) ps += std::exp(a[i] - pm), qs += std::exp(b[i] - qm);
      for (std::int64_t i = 0; i < vocab; ++i) {
        const double lp = a[i] - pm - std::log(ps), lq = b[i] - qm - std::log(qs);
        kl += std::exp(lp) * (lp - lq);
        const double slope = unit * (std::exp(lq) - std::exp(lp));
        EXPECT_NEAR(value_of(slopes[size(t * vocab + i)]), slope,
                    kBf16Eps * std::fabs(slope) + 1e-6);
      }
      EXPECT_NEAR(found[size(t)], kl, 1e-5 * (1 + kl));
    }
    EXPECT_EQ(found[2], 0);
  }
}

TEST_F(CudaTrainingOps, AdamEqualsTheCpus) {
  for (const std::size_t n : {std::size_t{1}, std::size_t{1000}, std::size_t{70001}}) {
    auto value = normal_values(n, 1);
    const auto start = value;
    std::vector<float> gradient(n);
    AdamTensor adam(value, gradient, 0.1), clocks(value, gradient, 0.1);
    const auto d_value = put(value), d_gradient = put(gradient);
    const auto m = put(std::vector<float>(n)), v = put(std::vector<float>(n));
    const cuda::DeviceBuffer<double> squares(2), parts(size(cuda::kSquareSumParts));
    const cuda::DeviceBuffer<float> scale(2);
    for (int step = 0; step < 3; ++step) {
      // In place: both borrow it.
      std::ranges::copy(normal_values(n, static_cast<unsigned>(10 + step)), gradient.begin());
      double square = 0;
      for (const float g : gradient) square += static_cast<double>(g) * g;
      const double clip = std::sqrt(2 * square) * (step == 1 ? 2 : 0.5);
      copy_bytes_in(reinterpret_cast<std::byte*>(d_gradient.data()), gradient.data(), n * 4,
                    stream);
      // Twice the same tensor: the norm is that of all.
      for (int i = 0; i < 2; ++i) {
        cuda::square_sum(d_gradient.data(), std::ssize(gradient), parts.data(), squares.data() + i,
                         stream);
      }
      cuda::clip_scale(squares.data(), 2, 2, clip, scale.data(), stream);
      const AdamTensor::Step now = clocks.count_step(0.5);
      cuda::adam({now.correction1, now.correction2, now.rate}, scale.data(), std::ssize(gradient),
                 d_value.data(), d_gradient.data(), m.data(), v.data(), stream);
      EXPECT_NEAR(get(squares)[1], square, 1e-9 * square);
      const double expected_scale = step == 1 ? 1 : 0.5;
      EXPECT_NEAR(get(scale)[0], expected_scale, 1e-6);
      adam.step(lender.ctx, 0.5, expected_scale);
      const auto found = get(d_value);
      for (std::size_t i = 0; i < n; ++i) {
        ASSERT_NEAR(found[i], value[i], 2e-6 * (1 + std::fabs(value[i]))) << step;
      }
      EXPECT_EQ(get(d_gradient), std::vector<float>(n));
    }
    EXPECT_NE(value, start);
    // The first alone is clipped; no limit; and no step from what is no number.
    const double norm = std::sqrt(get(squares)[0]);
    cuda::clip_scale(squares.data(), 1, 2, norm / 4, scale.data(), stream);
    EXPECT_NEAR(get(scale)[0], 0.25, 1e-6);
    EXPECT_EQ(get(scale)[1], 1);
    cuda::clip_scale(squares.data(), 2, 2, 0, scale.data(), stream);
    EXPECT_EQ(get(scale)[0], 1);
    gradient[n / 2] = n == 1 ? kNan : kInf;
    copy_bytes_in(reinterpret_cast<std::byte*>(d_gradient.data()), gradient.data(), n * 4, stream);
    cuda::square_sum(d_gradient.data(), std::ssize(gradient), parts.data(), squares.data(), stream);
    for (const std::int64_t n_clipped : {0, 1}) {  // wherever it is
      cuda::clip_scale(squares.data(), n_clipped, 2, 1, scale.data(), stream);
      EXPECT_TRUE(std::isnan(get(scale)[0]) && std::isnan(get(scale)[1]));
    }
    const auto before = get(d_value), before_m = get(m), before_v = get(v);
    cuda::adam({1, 1, 1}, scale.data(), std::ssize(gradient), d_value.data(), d_gradient.data(),
               m.data(), v.data(), stream);
    EXPECT_TRUE(std::isnan(get(scale)[0]));
    EXPECT_EQ(get(d_value), before);
    EXPECT_EQ(get(m), before_m);
    EXPECT_EQ(get(v), before_v);
  }
}

TEST_F(CudaTrainingOps, ScalesOfBlocksEqualTheCpus) {
  for (const DType dtype : {DType::Q4_0, DType::Q4_1, DType::Q8_0}) {
    const std::int64_t rows = 3, cols = 96, n = rows * cols / 32;
    const auto values = normal_values(size(rows * cols), 1);
    std::vector<std::byte> packed(size(rows * row_bytes(dtype, cols)));
    for (std::int64_t r = 0; r < rows; ++r) {
      kernels::quantize_row(dtype, {values.data() + r * cols, size(cols)},
                            packed.data() + r * row_bytes(dtype, cols));
    }
    BlockScales scales(WeightView{packed.data(), dtype, rows, cols, nullptr});
    auto gradient = normal_values(values.size(), 2);
    scales.gather(lender.ctx, {gradient.data(), rows, cols});
    const auto codes = put(std::vector<std::int8_t>(scales.codes().begin(), scales.codes().end()));
    const auto as_vector = [](std::span<const float> s) {
      return std::vector<float>(s.begin(), s.end());
    };
    const auto d_gradient = put(gradient);
    const cuda::DeviceBuffer<float> d_scale(size(n)), d_offset(size(n)), weights(values.size());
    const bool offsets = !scales.offset().empty();
    cuda::gather_scales(codes.data(), d_gradient.data(), n, d_scale.data(),
                        offsets ? d_offset.data() : nullptr, stream);
    const auto expect_near = [&](const std::vector<float>& found, std::span<const float> expected) {
      for (std::size_t i = 0; i < expected.size(); ++i) {
        EXPECT_NEAR(found[i], expected[i], 1e-5 * (100 + std::fabs(expected[i])));
      }
    };
    expect_near(get(d_scale), scales.scale_gradient());
    if (offsets) expect_near(get(d_offset), scales.offset_gradient());
    std::vector<float> expected(values.size());
    scales.scatter(lender.ctx, {expected.data(), rows, cols});
    const auto s = put(as_vector(scales.scale())), o = put(as_vector(scales.offset()));
    cuda::scatter_scales(codes.data(), s.data(), offsets ? o.data() : nullptr, n, weights.data(),
                         stream);
    EXPECT_EQ(get(weights), expected);
  }
}

}  // namespace
}  // namespace moesaic::converter
