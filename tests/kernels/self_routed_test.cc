#include "kernels/self_routed.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "kernels/base/error.h"
#include "kernels/columns.h"
#include "kernels/neurons.h"
#include "kernels/packing.h"
#include "kernels/panels.h"
#include "kernels/rms_norm.h"
#include "tests/kernels/self_routed_layer.h"
#include "tests/reference/self_routed.h"

namespace moesaic::kernels {
namespace {

using Options = SelfRoutedOptions;
using Layer = SelfRoutedLayer;

reference::Precision precision(Activations activations, const WeightView& w) {
  constexpr double kSum = 32 * kEps;
  const double bf16 = 0x1.01p-9;
  if (activations == Activations::BF16) {
    // Weights of large batches may be rounded too.
    return {.element = w.dtype == DType::BF16 ? bf16 : 2 * bf16, .sum = kSum};
  }
  if (activations == Activations::Q16 && w.panels != nullptr) {
    if (w.dtype == DType::BF16) return {.element = bf16, .sum = kSum};
    return {.unit = 0.5001 / (127 * 128), .sum = kSum};
  }
  return {.sum = kSum};
}

reference::SelfRouted expected_of(const Layer& layer, const std::vector<float>& x,
                                  Activations activations) {
  const SelfRoutedView& v = layer.view;
  const ConstMatrix rows(x.data(), std::ssize(x) / v.d_model(), v.d_model());
  return reference::self_routed(v, rows, precision(activations, v.w_gate),
                                precision(activations, v.w_up), precision(activations, v.w_down));
}

class SelfRouted : public OnEachTarget {
 protected:
  struct Result {
    std::vector<float> y;
    std::int64_t multiply_adds = 0;
    std::int64_t bytes = 0;
  };
  static Result run(const SelfRoutedView& layer, const std::vector<float>& x, SelfRoutedPath path,
                    Activations activations = Activations::Q16, int n_threads = 2,
                    std::span<const float> norm = {}) {
    Lender lender(n_threads);
    lender.ctx.activations = activations;
    const std::int64_t n = std::ssize(x) / layer.d_model();
    Result r{.y = std::vector<float>(x.size(), kNan)};
    r.multiply_adds =
        self_routed(lender.ctx, layer, {ConstMatrix(x.data(), n, layer.d_model()), norm, 1e-5f},
                    Matrix(r.y.data(), n, layer.d_model()), {}, path);
    r.bytes = lender.tally.total();
    EXPECT_EQ(lender.tally.bytes(Traffic::Mlp), r.bytes);
    return r;
  }

  static void expect_layer(const Layer& layer, const std::vector<float>& x, const Result& found,
                           Activations activations) {
    expect_layer(layer, expected_of(layer, x, activations), found);
  }
  static void expect_layer(const Layer& layer, const reference::SelfRouted& expected,
                           const Result& found) {
    for (std::size_t i = 0; i < found.y.size(); ++i) {
      ASSERT_NEAR(found.y[i], expected.y[i], expected.error[i] + 1e-30) << "element " << i;
    }
    if (expected.n_doubtful == 0) {
      EXPECT_EQ(found.multiply_adds, reference::multiply_adds(layer.view, expected));
    } else {
      EXPECT_NEAR(static_cast<double>(found.multiply_adds),
                  static_cast<double>(reference::multiply_adds(layer.view, expected)),
                  static_cast<double>(2 * expected.n_doubtful * layer.view.d_model()));
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, SelfRouted, every_target(), target_name);

constexpr SelfRoutedPath kPaths[] = {SelfRoutedPath::Dense, SelfRoutedPath::Sparse};
const char* name(SelfRoutedPath path) { return path == SelfRoutedPath::Dense ? "dense" : "sparse"; }

TEST_P(SelfRouted, EveryFormatPathAndActivationEqualsReference) {
  std::int64_t n_certain = 0;
  for (const DTypeTraits& t : kDTypes) {
    for (const bool up_by_input : {false, true}) {
      Options o{.gate = t.dtype, .up = t.dtype, .down = t.dtype, .up_by_input = up_by_input};
      if (t.block_elems == 256) o.d_model = o.d_ff = 256;
      const Layer layer(o);
      for (const Activations activations :
           {Activations::F32, Activations::BF16, Activations::Q16}) {
        for (const std::int64_t n_tokens : {1, 5}) {
          const std::vector<float> x = normal_values(size(n_tokens * o.d_model), 7);
          const reference::SelfRouted expected = expected_of(layer, x, activations);
          for (const SelfRoutedPath path : kPaths) {
            SCOPED_TRACE(testing::Message()
                         << t.name << (up_by_input ? " input " : " gate ") << name(path) << " Q"
                         << static_cast<int>(activations) << " tokens " << n_tokens);
            expect_layer(layer, expected, run(layer.view, x, path, activations, 1));
          }
          n_certain += expected.n_doubtful == 0;
        }
      }
    }
  }
  EXPECT_GT(n_certain, 30);  // where multiply-adds were compared exactly
}

TEST_P(SelfRouted, FormatsMayDiffer) {
  for (const bool up_by_input : {false, true}) {
    const Layer layer({.gate = DType::Q8_0,
                       .up = DType::BF16,
                       .down = DType::Q4_0,
                       .up_by_input = up_by_input,
                       .phi = Activation::GeluTanh});
    const std::vector<float> x = normal_values(3 * 192, 7);
    for (const SelfRoutedPath path : kPaths) {
      SCOPED_TRACE(name(path));
      expect_layer(layer, x, run(layer.view, x, path), Activations::Q16);
    }
  }
}

TEST_P(SelfRouted, ShapesWithoutFastLayout) {
  for (const auto& [dtype, d_model, d_ff] : {std::tuple{DType::F32, 37, 51},
                                             {DType::Q8_0, 96, 160},
                                             {DType::Q4_1, 32, 32},
                                             {DType::BF16, 64, 96},
                                             {DType::F32, 1, 1}}) {
    for (const bool up_by_input : {false, true}) {
      const Layer layer({.gate = dtype,
                         .up = dtype,
                         .down = dtype,
                         .d_model = d_model,
                         .d_ff = d_ff,
                         .up_by_input = up_by_input});
      EXPECT_EQ(layer.view.gate_columns, nullptr);
      const std::vector<float> x = normal_values(size(5 * d_model), 7);
      for (const SelfRoutedPath path : kPaths) {
        expect_layer(layer, x, run(layer.view, x, path), Activations::Q16);
      }
    }
  }
}

TEST_P(SelfRouted, NormedInputEqualsNormedBefore) {
  const Layer layer({});
  const std::vector<float> x = normal_values(2 * 192, 7, 5), norm = normal_values(192, 8);
  Lender lender;
  std::vector<float> normed(x.size());
  rms_norm(lender.ctx, ConstMatrix(x.data(), 2, 192), norm, 1e-5f, Matrix(normed.data(), 2, 192));
  for (const SelfRoutedPath path : kPaths) {
    const Result r = run(layer.view, x, path, Activations::Q16, 2, norm);
    EXPECT_EQ(r.y, run(layer.view, normed, path).y);
    expect_layer(layer, normed, r, Activations::Q16);
  }
}

TEST_P(SelfRouted, ZeroThresholdsKeepAll) {
  for (const bool up_by_input : {false, true}) {
    Layer layer({.up_by_input = up_by_input});
    for (auto* v : {&layer.input_threshold, &layer.gate_threshold, &layer.hidden_threshold}) {
      std::fill(v->begin(), v->end(), 0.0f);
    }
    std::vector<float> x = normal_values(2 * 192, 7);
    x[5] = 0;
    for (const SelfRoutedPath path : kPaths) {
      const Result r = run(layer.view, x, path);
      expect_layer(layer, x, r, Activations::Q16);
      EXPECT_EQ(r.multiply_adds, 2 * 3 * 192 * 320);
    }
  }
}

TEST_P(SelfRouted, InfiniteThresholdsKeepNothing) {
  for (const bool up_by_input : {false, true}) {
    for (int which = 0; which < 3; ++which) {
      Layer layer({.up_by_input = up_by_input});
      if (which == 1 && up_by_input) continue;
      auto& v = which == 0   ? layer.input_threshold
                : which == 1 ? layer.gate_threshold
                             : layer.hidden_threshold;
      std::fill(v.begin(), v.end(), kInf);
      const std::vector<float> x = normal_values(3 * 192, 7);
      for (const SelfRoutedPath path : kPaths) {
        const Result r = run(layer.view, x, path);
        EXPECT_EQ(r.y, std::vector<float>(x.size(), 0.0f)) << name(path);
        expect_layer(layer, x, r, Activations::Q16);
      }
    }
  }
}

// Values that every product gives exactly: what equals its threshold is kept.
TEST_P(SelfRouted, TiesAreKept) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const bool above : {false, true}) {
      Layer layer({.gate = dtype, .up = dtype, .down = dtype});
      std::vector<float> x(192, 0.0f), weights(192 * 320);
      for (std::size_t j = 0; j < 192; ++j) x[j] = static_cast<float>(static_cast<int>(j % 9) - 4);
      for (std::size_t i = 0; i < weights.size(); ++i) {
        weights[i] = static_cast<float>(static_cast<int>(i * 7 % 5) - 2);
      }
      std::vector<std::byte> bytes(size(row_bytes(dtype, 192 * 320)));
      quantize_row(dtype, weights, bytes.data());
      for (WeightView* w : {&layer.view.w_gate, &layer.view.w_up, &layer.view.w_down}) {
        w->data = bytes.data();
        w->panels = nullptr;
      }
      ThreadPool pool(1);
      layer.view.gate_columns = layer.view.up_parts = layer.view.down_columns = nullptr;
      Pieces pieces(layer.buffer.data());
      pack_self_routed(layer.view, pool, pieces);

      Lender lender;
      std::vector<float> product(320), a(320), h(320);
      const std::vector<float> ones(320, 1.0f);
      for (std::size_t i = 0; i < 320; ++i) {
        product[i] = 0;
        for (std::size_t j = 0; j < 192; ++j) product[i] += weights[i * 192 + j] * x[j];
      }
      const Matrix a_row(a.data(), 1, 320);
      gated_activation(lender.ctx, Activation::Silu, ConstMatrix(product.data(), 1, 320),
                       ConstMatrix(ones.data(), 1, 320), a_row);
      const auto next = [&](float v) { return above ? std::nextafter(v, kInf) : v; };
      std::int64_t n_routed = 0, n_kept = 0;
      for (std::size_t j = 0; j < 192; ++j) layer.input_threshold[j] = std::fabs(x[j]);
      for (std::size_t i = 0; i < 320; ++i) {
        layer.gate_threshold[i] = i % 3 == 0 ? next(std::fabs(a[i])) : 0;
        layer.hidden_threshold[i] = i % 3 == 1 ? next(std::fabs(a[i] * product[i])) : 0;
        const bool routed = i % 3 != 0 || !above;
        n_routed += routed;
        n_kept += routed && (i % 3 != 1 || !above);
      }
      for (const SelfRoutedPath path : kPaths) {
        EXPECT_EQ(run(layer.view, x, path).multiply_adds,
                  multiply_adds(layer.view, 192, n_routed, n_kept))
            << name(path) << above;
      }
    }
  }
}

TEST_P(SelfRouted, TiesOfTheInput) {
  Layer layer({});
  const std::vector<float> x = normal_values(192, 7);
  std::fill(layer.hidden_threshold.begin(), layer.hidden_threshold.end(), kInf);
  std::fill(layer.gate_threshold.begin(), layer.gate_threshold.end(), kInf);
  for (const bool above : {false, true}) {
    for (std::size_t j = 0; j < 192; ++j) {
      const float v = std::fabs(x[j]);
      layer.input_threshold[j] = above ? std::nextafter(v, kInf) : v;
    }
    for (const SelfRoutedPath path : kPaths) {
      EXPECT_EQ(run(layer.view, x, path).multiply_adds, above ? 0 : 192 * 320) << name(path);
    }
  }
}

TEST_P(SelfRouted, WhatIsNotANumberStaysInItsToken) {
  for (const bool up_by_input : {false, true}) {
    for (const DType dtype : {DType::Q4_1, DType::BF16}) {
      const Layer layer({.gate = dtype, .up = dtype, .down = dtype, .up_by_input = up_by_input});
      const std::vector<float> good = normal_values(3 * 192, 7);
      std::vector<float> x = good;
      x[192 + 40] = kNan;
      for (const SelfRoutedPath path : kPaths) {
        const Result r = run(layer.view, x, path), clean = run(layer.view, good, path);
        for (std::size_t i = 0; i < x.size(); ++i) {
          if (i / 192 != 1) {
            EXPECT_EQ(r.y[i], clean.y[i]);
          } else if (!up_by_input) {
            EXPECT_EQ(r.y[i], 0) << name(path);  // every up product is NaN, so nothing is kept
          }
        }
        if (!up_by_input) continue;
        // NaN is below the input's threshold: as if it were 0.
        std::vector<float> zeroed = x;
        zeroed[192 + 40] = 0;
        EXPECT_EQ(r.y, run(layer.view, zeroed, path).y);
        EXPECT_EQ(r.multiply_adds, run(layer.view, zeroed, path).multiply_adds);
      }
    }
  }
}

TEST_P(SelfRouted, NoTokens) {
  const Layer layer({});
  for (const SelfRoutedPath path : kPaths) {
    const Result r = run(layer.view, {}, path);
    EXPECT_EQ(r.multiply_adds, 0);
    EXPECT_EQ(r.bytes, 0);
  }
}

TEST_P(SelfRouted, ThreadCountsAgree) {
  for (const bool up_by_input : {false, true}) {
    for (const DType dtype : {DType::Q4_1, DType::Q8_0, DType::BF16}) {
      const Layer layer({.gate = dtype, .up = dtype, .down = dtype, .up_by_input = up_by_input});
      const std::vector<float> x = normal_values(5 * 192, 7);
      for (const SelfRoutedPath path : kPaths) {
        const Result one = run(layer.view, x, path, Activations::Q16, 1);
        for (const int n_threads : {1, 2, 3, 5}) {
          const Result r = run(layer.view, x, path, Activations::Q16, n_threads);
          expect_layer(layer, x, r, Activations::Q16);
          EXPECT_EQ(r.multiply_adds, one.multiply_adds);
          EXPECT_EQ(r.bytes, one.bytes);
          EXPECT_EQ(r.y, run(layer.view, x, path, Activations::Q16, n_threads).y);
        }
      }
    }
  }
}

TEST_P(SelfRouted, TokenAloneEqualsTokenInBatch) {
  const Layer layer({});
  const std::vector<float> x = normal_values(4 * 192, 7);
  for (const SelfRoutedPath path : kPaths) {
    const std::vector<float> together = run(layer.view, x, path).y;
    for (std::size_t t = 0; t < 4; ++t) {
      const auto at = [&](const std::vector<float>& v) {
        return v.begin() + static_cast<std::ptrdiff_t>(192 * t);
      };
      const std::vector<float> alone =
          run(layer.view, std::vector<float>(at(x), at(x) + 192), path).y;
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(), at(together)));
    }
  }
}

TEST_P(SelfRouted, BytesAreThoseOfTheLists) {
  for (const bool up_by_input : {false, true}) {
    for (const DType dtype : {DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::BF16}) {
      const Layer layer({.gate = dtype, .up = dtype, .down = dtype, .up_by_input = up_by_input});
      if (layer.view.gate_columns == nullptr) continue;  // not this target
      for (unsigned seed = 7; seed < 12; ++seed) {
        const std::vector<float> x = normal_values(2 * 192, seed);
        const reference::SelfRouted lists = expected_of(layer, x, Activations::Q16);
        if (lists.n_doubtful > 0) continue;
        const auto columns = [&](const std::vector<std::int64_t>& ids, const WeightView& w) {
          const ColumnLayout layout = column_layout(dtype, w.rows);
          std::int64_t bytes = std::ssize(ids) * layout.column_bytes;
          for (std::size_t i = 0; i < ids.size(); ++i) {
            if (i == 0 || ids[i] / 32 != ids[i - 1] / 32) bytes += layout.scale_bytes;
          }
          return bytes;
        };
        std::int64_t expected = 0;
        for (std::size_t t = 0; t < 2; ++t) {
          expected += columns(lists.inputs[t], layer.view.w_gate);
          expected += up_by_input ? columns(lists.inputs[t], layer.view.w_up)
                                  : std::ssize(lists.routed[t]) *
                                        neuron_layout(dtype, 192).single_row_bytes();
          expected += columns(lists.kept[t], layer.view.w_down);
        }
        EXPECT_EQ(run(layer.view, x, SelfRoutedPath::Sparse).bytes, expected)
            << traits(dtype).name << up_by_input;
      }
    }
  }
}

TEST_P(SelfRouted, AutoTakesSparseForFewColumnsOfFewTokens) {
  Lender lender;
  Layer layer({});
  layer.view.input_share = layer.view.gate_share = layer.view.hidden_share = 0.15f;
  const auto path = [&](std::int64_t n) {
    return choose_self_routed_path(lender.ctx, layer.view, n);
  };
  EXPECT_EQ(path(1), SelfRoutedPath::Dense);  // float32 activations
  lender.ctx.activations = Activations::Q16;
  EXPECT_EQ(path(1),
            layer.view.gate_columns != nullptr ? SelfRoutedPath::Sparse : SelfRoutedPath::Dense);
  EXPECT_EQ(path(64), SelfRoutedPath::Dense);
  layer.view.input_share = layer.view.gate_share = layer.view.hidden_share = 1;
  EXPECT_EQ(path(1), SelfRoutedPath::Dense);
  const Layer plain({.packed = false});
  EXPECT_EQ(choose_self_routed_path(lender.ctx, plain.view, 1), SelfRoutedPath::Dense);
}

TEST_P(SelfRouted, ShapesAreChecked) {
  const Layer layer({});
  Lender lender;
  std::vector<float> x(192), y(192);
  const auto error = [&](SelfRoutedView v, std::int64_t cols = 192) -> std::string {
    try {
      self_routed(lender.ctx, v, {.x = ConstMatrix(x.data(), 1, cols)}, Matrix(y.data(), 1, cols));
    } catch (const ShapeError& e) {
      return e.what();
    }
    return "nothing thrown";
  };
  const auto names = [&](const std::string& text, std::string_view part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  SelfRoutedView v = layer.view;
  names(error(v, 191), "x [1, 191]");
  v.w_up.rows = 319;
  names(error(v), "w_up");
  v = layer.view;
  v.w_down.cols = 300;
  names(error(v), "w_down");
  v = layer.view;
  v.input_threshold = v.input_threshold.first(191);
  names(error(v), "input_threshold");
  v = layer.view;
  v.gate_threshold = {};
  names(error(v), "gate_threshold");
  v = layer.view;
  v.up_by_input = true;
  names(error(v), "gate_threshold");
  v = layer.view;
  v.hidden_threshold = v.hidden_threshold.first(1);
  names(error(v), "hidden_threshold");
}

}  // namespace
}  // namespace moesaic::kernels
