#include "kernels/cuda/self_routed.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device_self_routed.h"
#include "tests/kernels/cuda/self_routed_checks.h"
#include "tests/reference/self_routed.h"

namespace moesaic::cuda {
namespace {

using Layer = kernels::SelfRoutedLayer;
using Options = kernels::SelfRoutedOptions;
using kernels::SelfRoutedView;

constexpr reference::Precision kFloat{.sum = 32 * kEps};

class SelfRouted : public OnDevice {
 protected:
  std::vector<float> run(const DeviceSelfRouted& layer, const std::vector<float>& x) {
    return run(layer, x, zeroed_workspace(layer, stream));
  }
  std::vector<float> run(const DeviceSelfRouted& layer, const std::vector<float>& x,
                         const DeviceBuffer<std::byte>& workspace) {
    const std::int64_t d_model = layer.view.d_model(), n = std::ssize(x) / d_model;
    const DeviceMatrix in(x, n, d_model, stream), out(n, d_model);
    self_routed(layer.view, in.view(), out.view(), workspace.data(), stream);
    return out.host(stream);
  }
  // The host's layer has no packed parts, so that its views are the file's rows.
  void expect_layer(const Layer& host, std::int64_t n_tokens, unsigned seed = 7) {
    const std::int64_t d_model = host.view.d_model();
    const std::vector<float> x = normal_values(size(n_tokens * d_model), seed);
    const auto expected = reference::self_routed(
        host.view, ConstMatrix(x.data(), n_tokens, d_model), kFloat, kFloat, kFloat);
    const std::vector<float> found = run(DeviceSelfRouted(host.view, stream), x);
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_NEAR(found[i], expected.y[i], expected.error[i] + 1e-30) << "element " << i;
    }
    n_certain += expected.n_doubtful == 0;
    n_kept += static_cast<std::int64_t>(expected.kept[0].size());
  }
  static Options plain(Options o) {
    o.packed = false;
    return o;
  }
  std::int64_t n_certain = 0;  // runs whose thresholds left no doubt
  std::int64_t n_kept = 0;     // neurons of all runs' first tokens
};

TEST_F(SelfRouted, EveryDTypeByGateAndByInput) {
  for (const DTypeTraits& t : kDTypes) {
    for (const bool up_by_input : {false, true}) {
      SCOPED_TRACE(testing::Message() << t.name << (up_by_input ? " input" : " gate"));
      Options o{.gate = t.dtype, .up = t.dtype, .down = t.dtype, .up_by_input = up_by_input};
      if (t.block_elems == 256) o.d_model = o.d_ff = 256;
      expect_layer(Layer(plain(o)), 1);
    }
  }
  EXPECT_GT(n_certain, 15);
  EXPECT_GT(n_kept, 22 * 50);
}

TEST_F(SelfRouted, FormatsMayDiffer) {
  for (const bool up_by_input : {false, true}) {
    for (const auto& [gate, up, down] : {std::tuple{DType::Q8_0, DType::BF16, DType::Q4_0},
                                         {DType::Q4_1, DType::Q4_1, DType::Q5_0},
                                         {DType::Q5_1, DType::Q5_1, DType::Q4_1}}) {
      expect_layer(Layer(plain({.gate = gate,
                                .up = up,
                                .down = down,
                                .up_by_input = up_by_input,
                                .phi = kernels::Activation::GeluTanh})),
                   1);
    }
  }
}

// Panels of 64 rows, units of 32 columns, groups of units: sizes around each.
TEST_F(SelfRouted, SizesAcrossPanelsUnitsAndGroups) {
  for (const auto& [dtype, d_model, d_ff] : {std::tuple{DType::F32, 4, 4},
                                             {DType::F32, 36, 68},
                                             {DType::BF16, 60, 124},
                                             {DType::F16, 132, 64},
                                             {DType::Q8_0, 96, 32},
                                             {DType::Q4_0, 32, 1056},
                                             {DType::Q4_1, 64, 2048}}) {
    for (const bool up_by_input : {false, true}) {
      SCOPED_TRACE(testing::Message() << traits(dtype).name << " " << d_model << " x " << d_ff);
      expect_layer(Layer(plain({.gate = dtype,
                                .up = dtype,
                                .down = dtype,
                                .d_model = d_model,
                                .d_ff = d_ff,
                                .up_by_input = up_by_input})),
                   1);
    }
  }
}

TEST_F(SelfRouted, TokensOfABatchEqualEachAlone) {
  for (const DType dtype : {DType::Q4_1, DType::Q5_0}) {
    for (const bool up_by_input : {false, true}) {
      const Layer host(
          plain({.gate = dtype, .up = dtype, .down = dtype, .up_by_input = up_by_input}));
      expect_layer(host, 11);
      const DeviceSelfRouted layer(host.view, stream);
      const std::vector<float> x = normal_values(11 * 192, 8);
      const std::vector<float> together = run(layer, x);
      for (const std::ptrdiff_t t : {0, 7, 10}) {
        const auto alone = run(layer, {x.begin() + 192 * t, x.begin() + 192 * (t + 1)});
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + 192 * t)) << t;
      }
    }
  }
}

TEST_F(SelfRouted, ZeroThresholdsKeepAllInfiniteOnesNothing) {
  for (const bool up_by_input : {false, true}) {
    for (int which = 0; which < 4; ++which) {  // all zero, or one of the three infinite
      Layer host(plain({.up_by_input = up_by_input}));
      for (auto* v : {&host.input_threshold, &host.gate_threshold, &host.hidden_threshold}) {
        std::ranges::fill(*v, 0.0f);
      }
      if (which == 1) std::ranges::fill(host.input_threshold, kInf);
      if (which == 2) std::ranges::fill(host.gate_threshold, kInf);
      if (which == 3) std::ranges::fill(host.hidden_threshold, kInf);
      expect_layer(host, 1);
      const auto y = run(DeviceSelfRouted(host.view, stream), normal_values(192, 7));
      const bool nothing = which == 1 || which == 3 || (which == 2 && !up_by_input);
      EXPECT_EQ(std::ranges::all_of(y, [](float v) { return v == 0; }), nothing) << which;
    }
  }
}

// Values that every product gives exactly: what equals its threshold is kept.
TEST_F(SelfRouted, TiesAreKept) {
  expect_ties_kept([&](const Layer& l, const std::vector<float>& x) {
    return run(DeviceSelfRouted(l.view, stream), x);
  });
}

TEST_F(SelfRouted, WhatIsNotANumberStaysInItsToken) {
  expect_nan_stays([&](const Layer& l, const std::vector<float>& x) {
    return run(DeviceSelfRouted(l.view, stream), x);
  });
}

TEST_F(SelfRouted, RepeatsBitForBitWithTheSameWorkspace) {
  for (const DType dtype : {DType::Q4_0, DType::Q5_0}) {
    const Layer host(plain({.gate = dtype, .up = dtype, .down = dtype, .d_ff = 1024}));
    const DeviceSelfRouted layer(host.view, stream);
    const auto workspace = zeroed_workspace(layer, stream);
    const auto x = normal_values(192, 13), other = normal_values(9 * 192, 14);
    const auto first = run(layer, x, workspace);
    run(layer, other, workspace);
    EXPECT_EQ(first, run(layer, x, workspace));
  }
}

TEST_F(SelfRouted, NamesTheShapes) {
  const Layer host(plain({}));
  const DeviceSelfRouted layer(host.view, stream);
  const DeviceMatrix x(1, 192), two(2, 192), narrow(1, 64);
  const auto expect_thrown = [&](const SelfRoutedView& view, Matrix in, Matrix out) {
    EXPECT_THROW(self_routed(view, in, out, nullptr, stream), ShapeError);
  };
  expect_thrown(layer.view, two.view(), x.view());
  expect_thrown(layer.view, x.view(), narrow.view());
  SelfRoutedView wrong = layer.view;
  wrong.hidden_threshold = wrong.hidden_threshold.first(319);
  expect_thrown(wrong, x.view(), x.view());
  wrong = layer.view;
  wrong.w_up.data += 2;
  expect_thrown(wrong, x.view(), x.view());
}

TEST_F(SelfRouted, NoTokens) {
  const Layer host(plain({}));
  const DeviceSelfRouted layer(host.view, stream);
  self_routed(layer.view, ConstMatrix(nullptr, 0, 192), Matrix(nullptr, 0, 192), nullptr, stream);
}

// Every entry of a matrix in panels is that of its row, for sizes that leave panels and units open.
TEST(ColumnPanels, HoldWhatRowsHold) {
  for (const DType dtype : {DType::F32, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1}) {
    const Packed w(dtype, 70, 96, 1);
    const ColumnPanels layout = column_panels(w.view());
    EXPECT_EQ(layout.n_panels, 2);
    EXPECT_EQ(layout.n_units, 3);
    std::vector<std::byte> packed(size(layout.bytes()), std::byte{0xaa});
    pack_column_panels(w.view(), packed.data());
    std::vector<float> row(96);
    for (std::int64_t r = 0; r < 70; ++r) {
      kernels::dequantize_row(dtype, w.view().row(r), row);
      for (std::int64_t c = 0; c < 96; ++c) {
        const std::byte* unit =
            packed.data() + (r / 64 * layout.n_units + c / 32) * layout.unit_bytes();
        const std::byte* column = unit + layout.scale_bytes + c % 32 * layout.column_bytes;
        const std::int64_t at = r % 64;
        const auto half = [](const std::byte* p) {
          std::uint16_t bits;
          std::memcpy(&bits, p, 2);
          return kernels::f16_to_f32(bits);
        };
        float value = 0;
        if (dtype == DType::F32) {
          std::memcpy(&value, column + 4 * at, 4);
        } else if (dtype == DType::BF16) {
          std::memcpy(reinterpret_cast<std::byte*>(&value) + 2, column + 2 * at, 2);
        } else if (dtype == DType::Q8_0) {
          value = half(unit + 2 * at) * static_cast<float>(static_cast<std::int8_t>(column[at]));
        } else {
          std::uint32_t word;
          std::memcpy(&word, column + at % 32 / 4 * 4, 4);
          const auto code = static_cast<int>(word >> (at / 32 * 16 + at % 4 * 4) & 15u);
          value = dtype == DType::Q4_0
                      ? half(unit + 2 * at) * static_cast<float>(code - 8)
                      : half(unit + 4 * at) * static_cast<float>(code) + half(unit + 4 * at + 2);
        }
        ASSERT_EQ(value, row[size(c)]) << traits(dtype).name << " " << r << ", " << c;
      }
    }
  }
}

TEST(ColumnPanels, FormatsOfLargerBlocksHaveNone) {
  EXPECT_FALSE(has_column_panels(DType::Q4_K));
  EXPECT_THROW(column_panels(WeightView{nullptr, DType::Q5_1, 64, 64}), ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
