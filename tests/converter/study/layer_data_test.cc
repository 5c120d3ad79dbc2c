#include "converter/study/layer_data.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "converter/stream.h"
#include "kernels/base/error.h"
#include "tests/converter/study/student_loops.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter::study {
namespace {

using models::TinyModel;

Calibration tokens(std::int64_t n_windows, std::int64_t n_ctx) {
  Calibration text;
  text.n_ctx = n_ctx;
  std::mt19937_64 rng(2);
  for (std::int64_t i = 0; i < n_windows * n_ctx; ++i) {
    text.tokens.push_back(static_cast<std::int32_t>(rng() % TinyModel::kVocab));
  }
  return text;
}

struct Loaded : StudyCase {
  explicit Loaded(const std::function<void(TinyModel&)>& change = {})
      : file({.n_layers = 3}, change), model(models::Checkpoint::load(file.path), ctx) {}

  TinyModel file;
  models::Transformer model;
  engine::Monitor monitor;
};

TEST(CollectLayer, GivesWhatTheMlpSeesAndGives) {
  Loaded l;
  const Calibration text = tokens(33, 16);
  const LayerData data = collect_layer(l.model, text, 1, l.monitor);
  EXPECT_EQ(data.n_tokens(), 33 * 16);
  EXPECT_EQ(data.n_held_out(), 2 * 16);
  EXPECT_EQ(data.n_choose, 16);
  EXPECT_EQ(data.n_fit, 30 * 16);
  // Window by window, through a cache of its own.
  HostPasses passes(l.model);
  const auto stream = passes.stream(std::span(text.tokens).subspan(5 * 16, 16), 16);
  stream->attention(0);
  stream->mlp(0, passes.own_mlp(0));
  stream->attention(1);
  std::vector<float> x(16 * TinyModel::kModel);
  std::vector<float> y(x.size());
  const Matrix mx(x.data(), 16, TinyModel::kModel);
  const Matrix my(y.data(), 16, TinyModel::kModel);
  stream->mlp_rows(1, {.x = mx, .y = my});
  for (std::int64_t t = 0; t < 16; ++t) {
    for (std::int64_t j = 0; j < TinyModel::kModel; ++j) {
      EXPECT_NEAR(data.inputs().row(80 + t)[j], mx.row(t)[j], 1e-4);
      EXPECT_NEAR(data.outputs().row(80 + t)[j] * data.y_scale, my.row(t)[j], 1e-4);
    }
  }
  // Unit variance of the fitted rows, counted once more.
  double variance = 0;
  for (std::int64_t j = 0; j < data.d_model; ++j) {
    double sum = 0;
    double square = 0;
    for (std::int64_t t = 0; t < data.n_fit; ++t) {
      sum += data.outputs().row(t)[j];
      square += std::pow(data.outputs().row(t)[j], 2);
    }
    const auto n = static_cast<double>(data.n_fit);
    variance += (square / n - sum / n * (sum / n)) / static_cast<double>(data.d_model);
  }
  EXPECT_NEAR(variance, 1, 1e-4);
  for (std::int64_t t = 0; t < data.n_tokens(); t += 16) {
    EXPECT_TRUE(data.sink[static_cast<std::size_t>(t)]);
  }
  EXPECT_GE(data.n_sinks(0, data.n_tokens()), 33);
}

TEST(CollectLayer, NanNamesTheLayer) {
  Loaded l([](TinyModel& m) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(m.tensor("blk.1.ffn_up.weight").data.data(), &nan, sizeof(nan));
  });
  const Calibration text = tokens(4, 16);
  EXPECT_NO_THROW(collect_layer(l.model, text, 0, l.monitor));
  try {
    collect_layer(l.model, text, 1, l.monitor);
    FAIL();
  } catch (const FormatError& e) {
    EXPECT_NE(std::string(e.what()).find(": layer 1 gives NaN"), std::string::npos) << e.what();
  }
}

TEST(CollectLayer, ConstantOutputIsRefused) {
  Loaded l([](TinyModel& m) {
    auto& data = m.tensor("blk.0.ffn_down.weight").data;
    std::fill(data.begin(), data.end(), std::byte{0});
  });
  try {
    collect_layer(l.model, tokens(4, 16), 0, l.monitor);
    FAIL();
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("layer 0: the MLP gives the same output"),
              std::string::npos)
        << e.what();
  }
}

TEST(CollectLayer, TooLittleTextAndNoSuchLayer) {
  Loaded l;
  EXPECT_THROW(collect_layer(l.model, tokens(2, 16), 0, l.monitor), InputError);
  EXPECT_THROW(collect_layer(l.model, tokens(4, 16), 3, l.monitor), InputError);
  EXPECT_NO_THROW(collect_layer(l.model, tokens(3, 16), 2, l.monitor));
}

TEST(LayerData, UnexplainedIsOverTheVarianceOfTheSameTokens) {
  LayerData data;
  data.d_model = 1;
  data.n_fit = 1;
  data.sink = {false, true, false, false};
  data.x = AlignedBuffer<float>(4);
  data.y = AlignedBuffer<float>(4);
  const std::vector<float> y = {0, 100, 1, 3};
  std::copy(y.begin(), y.end(), data.y.begin());
  std::vector<float> y_hat = {90, 2, 3};  // of rows 1 to 3
  const Unexplained u = data.unexplained(1, {y_hat.data(), 3, 1});
  const double mean = 104.0 / 3;
  EXPECT_NEAR(
      u.all, 101 / (std::pow(100 - mean, 2) + std::pow(1 - mean, 2) + std::pow(3 - mean, 2)), 1e-6);
  EXPECT_NEAR(u.without_sinks, 1.0 / 2, 1e-6);
}

TEST(Gaussian, ReproducesMeanAndCovariance) {
  StudyCase c;
  constexpr std::int64_t kDims = 7;
  constexpr std::int64_t kRows = 4000;
  std::vector<float> noise(kRows * kDims);
  std::vector<float> mix(kDims * kDims);
  c.fill(noise);
  c.fill(mix);
  std::vector<float> x(noise.size());
  for (std::int64_t t = 0; t < kRows; ++t) {
    for (std::int64_t j = 0; j < kDims; ++j) {
      float& v = x[static_cast<std::size_t>(t * kDims + j)];
      v = static_cast<float>(10 * j);
      for (std::int64_t i = 0; i < kDims; ++i) {
        v += mix[static_cast<std::size_t>(j * kDims + i)] *
             noise[static_cast<std::size_t>(t * kDims + i)];
      }
    }
  }
  const auto moments = [](const std::vector<float>& rows, std::int64_t n) {
    std::vector<double> m(kDims + kDims * kDims);
    for (std::int64_t t = 0; t < n; ++t) {
      for (std::size_t j = 0; j < kDims; ++j)
        m[j] += rows[static_cast<std::size_t>(t * kDims) + j] / static_cast<double>(n);
    }
    for (std::int64_t t = 0; t < n; ++t) {
      const float* row = rows.data() + t * kDims;
      for (std::size_t i = 0; i < kDims; ++i) {
        for (std::size_t j = 0; j < kDims; ++j)
          m[kDims + i * kDims + j] += (row[i] - m[i]) * (row[j] - m[j]) / static_cast<double>(n);
      }
    }
    return m;
  };
  const std::vector<double> wanted = moments(x, kRows);
  const Gaussian gaussian = fit_gaussian(c.ctx, {x.data(), kRows, kDims});
  const DMatrix product = multiply(gaussian.factor, false, gaussian.factor, true);
  for (std::size_t i = 0; i < kDims; ++i) {
    EXPECT_NEAR(gaussian.mean[i], wanted[i], 1e-4);
    for (std::size_t j = 0; j < kDims; ++j) {
      EXPECT_NEAR(product.data[i * kDims + j], wanted[kDims + i * kDims + j], 1e-3);
    }
  }

  constexpr std::int64_t kDrawn = 60000;
  std::vector<float> drawn(kDrawn * kDims);
  sample_gaussian(c.ctx, gaussian, 4, {drawn.data(), kDrawn, kDims});
  const std::vector<double> found = moments(drawn, kDrawn);
  const auto deviation = [&](std::size_t j) { return std::sqrt(wanted[kDims + j * kDims + j]); };
  for (std::size_t i = 0; i < kDims; ++i) {  // within five standard errors
    EXPECT_NEAR(found[i], wanted[i], 5 * deviation(i) / std::sqrt(kDrawn));
    for (std::size_t j = 0; j < kDims; ++j) {
      EXPECT_NEAR(found[kDims + i * kDims + j], wanted[kDims + i * kDims + j],
                  5 * std::sqrt(2.0 / kDrawn) * deviation(i) * deviation(j));
    }
  }
  // Normal, not only of these moments: the fourth of whitened components is 3.
  double fourth = 0;
  for (std::int64_t t = 0; t < kDrawn; ++t) {
    fourth += std::pow((drawn[static_cast<std::size_t>(t * kDims)] - wanted[0]) / deviation(0), 4);
  }
  EXPECT_NEAR(fourth / kDrawn, 3, 0.25);

  std::vector<float> again(drawn.size());
  sample_gaussian(c.ctx, gaussian, 4, {again.data(), kDrawn, kDims});
  EXPECT_EQ(drawn, again);
  sample_gaussian(c.ctx, gaussian, 5, {again.data(), kDrawn, kDims});
  EXPECT_NE(drawn, again);
}

TEST(Gaussian, FewerRowsThanColumns) {
  StudyCase c;
  std::vector<float> x(3 * 8);
  c.fill(x);
  const Gaussian g = fit_gaussian(c.ctx, {x.data(), 3, 8});
  std::vector<float> drawn(16 * 8);
  sample_gaussian(c.ctx, g, 1, {drawn.data(), 16, 8});
  for (const float v : drawn) EXPECT_TRUE(std::isfinite(v));
}

}  // namespace
}  // namespace moesaic::converter::study
