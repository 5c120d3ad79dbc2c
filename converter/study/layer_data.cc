#include "converter/study/layer_data.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>

#include "converter/fit.h"
#include "converter/rows.h"
#include "converter/stream.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"

namespace moesaic::converter::study {
namespace {

constexpr std::int64_t kTile = 2048;  // rows per product

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

double squared_length(const float* row, std::int64_t n) {
  double sum = 0;
  for (std::int64_t j = 0; j < n; ++j) sum += static_cast<double>(row[j]) * row[j];
  return sum;
}

std::vector<double> column_means(ConstMatrix m) {
  std::vector<double> mean(size(m.cols));
  for (std::int64_t t = 0; t < m.rows; ++t) {
    for (std::int64_t j = 0; j < m.cols; ++j) mean[size(j)] += m.row(t)[j];
  }
  for (double& v : mean) v /= static_cast<double>(m.rows);
  return mean;
}

// Divides the outputs by the root of their mean variance per component over the fitted rows. False
// where they do not vary beyond float32's rounding.
bool normalise(Context& ctx, LayerData& data) {
  const ConstMatrix fitted = data.outputs().slice(0, data.n_fit);
  const std::vector<double> mean = data.mean_output();
  std::vector<double> by_row(size(data.n_fit));
  std::vector<double> square(by_row.size());
  for_each_row(ctx, data.n_fit, [&](std::int64_t t, int) {
    double sum = 0;
    for (std::int64_t j = 0; j < data.d_model; ++j) {
      const double gap = fitted.row(t)[j] - mean[size(j)];
      sum += gap * gap;
    }
    by_row[size(t)] = sum;
    square[size(t)] = squared_length(fitted.row(t), data.d_model);
  });
  const double variance = std::accumulate(by_row.begin(), by_row.end(), 0.0);
  if (!(variance > 1e-10 * std::accumulate(square.begin(), square.end(), 0.0))) return false;
  data.y_scale = std::sqrt(variance / static_cast<double>(data.n_fit * data.d_model));
  const auto inverse = static_cast<float>(1 / data.y_scale);
  for_each_row(ctx, data.n_tokens(), [&](std::int64_t t, int) {
    float* row = data.y.data() + t * data.d_model;
    for (std::int64_t j = 0; j < data.d_model; ++j) row[j] *= inverse;
  });
  return true;
}

// Normal deviates in pairs (Box and Muller 1958), the same on every machine.
void fill_normal(std::mt19937_64& rng, float* to, std::int64_t n) {
  constexpr double kUnit = 1.0 / 9007199254740992.0;  // 2⁻⁵³
  for (std::int64_t j = 0; j < n; j += 2) {
    const double u = (static_cast<double>(rng() >> 11U) + 1) * kUnit;  // (0, 1]
    const double angle = 2 * std::numbers::pi * static_cast<double>(rng() >> 11U) * kUnit;
    const double radius = std::sqrt(-2 * std::log(u));
    to[j] = static_cast<float>(radius * std::cos(angle));
    if (j + 1 < n) to[j + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

}  // namespace

std::string_view inputs_name(Inputs inputs) { return inputs == Inputs::Real ? "real" : "gaussian"; }

std::optional<Inputs> inputs_from_name(std::string_view name) {
  for (const Inputs i : {Inputs::Real, Inputs::Gaussian}) {
    if (inputs_name(i) == name) return i;
  }
  return std::nullopt;
}

std::vector<double> LayerData::mean_output() const {
  return column_means(outputs().slice(0, n_fit));
}

std::int64_t LayerData::n_sinks(std::int64_t first, std::int64_t n) const {
  return std::count(sink.begin() + first, sink.begin() + first + n, true);
}

Unexplained LayerData::unexplained(std::int64_t first, ConstMatrix y_hat) const {
  LayerSample sample;
  sample.x = inputs().slice(first, y_hat.rows);
  sample.y = outputs().slice(first, y_hat.rows);
  std::vector<float> weight(size(y_hat.rows), 1.0F);
  sample.weight = weight;
  Unexplained out;
  out.all = relative_error(sample, y_hat);
  for (std::int64_t t = 0; t < y_hat.rows; ++t) {
    if (sink[size(first + t)]) weight[size(t)] = 0;
  }
  out.without_sinks = relative_error(sample, y_hat);
  return out;
}

void finish_layer(Context& ctx, LayerData& data, std::int64_t n_ctx, std::string_view name) {
  data.sink.resize(data.x.size() / size(data.d_model));
  const std::int64_t n_windows = data.n_tokens() / n_ctx;
  const std::int64_t n_held_out = std::max<std::int64_t>(1, n_windows / 16);
  const std::int64_t n_choose = std::max<std::int64_t>(1, n_windows / 32);
  data.n_fit = (n_windows - n_held_out - n_choose) * n_ctx;
  data.n_choose = n_choose * n_ctx;

  std::vector<double> length(data.sink.size());
  for_each_row(ctx, data.n_tokens(), [&](std::int64_t t, int) {
    length[size(t)] = squared_length(data.outputs().row(t), data.d_model) +
                      0 * squared_length(data.inputs().row(t), data.d_model);  // NaN if either is
  });
  for (const double v : length) {
    require<FormatError>(std::isfinite(v), "{} gives NaN or infinite values on the text", name);
  }
  std::vector<double> sorted = length;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  for (std::int64_t t = 0; t < data.n_tokens(); ++t) {
    data.sink[size(t)] = t % n_ctx == 0 || length[size(t)] > kSinkNorm * kSinkNorm * *middle;
  }
  require<InputError>(normalise(ctx, data),
                      "{}: the MLP gives the same output for all tokens of the text: there is no "
                      "variance to explain",
                      name);
}

LayerData collect_layer(models::Transformer& model, const Calibration& text, int layer,
                        engine::Monitor& monitor) {
  const std::int64_t n_windows = text.n_windows();
  require<InputError>(n_windows >= 3,
                      "the text gives {} windows of {} tokens, expected at least 3: one to train "
                      "on, one to choose the rate, one to judge",
                      n_windows, text.n_ctx);
  const auto& config = model.config();
  require<InputError>(layer >= 0 && layer < config.n_layers,
                      "--layer: {} given, the checkpoint has layers 0 to {}", layer,
                      config.n_layers - 1);
  LayerData data;
  data.d_model = config.d_model;
  {
    HostPasses passes(model);
    const std::unique_ptr<Stream> stream = passes.stream(text.tokens, text.n_ctx);
    for (int l = 0; l < layer; ++l) {
      monitor.check();
      stream->attention(l);
      stream->mlp(l, passes.own_mlp(l));
      monitor.advance(l + 1, "");
    }
    stream->attention(layer);
    data.x = AlignedBuffer<float>(text.tokens.size() * size(data.d_model));
    data.y = AlignedBuffer<float>(data.x.size());
    stream->mlp_rows(layer, {.x = {data.x.data(), stream->n_tokens(), data.d_model},
                             .y = {data.y.data(), stream->n_tokens(), data.d_model}});
  }
  finish_layer(model.context(), data, text.n_ctx,
               fmt::format("{}: layer {}", model.checkpoint().file->path().string(), layer));
  return data;
}

Gaussian fit_gaussian(Context& ctx, ConstMatrix x) {
  Context exact = ctx.with(Activations::F32);
  const std::int64_t d = x.cols;
  Gaussian out;
  out.mean = column_means(x);
  DMatrix covariance(d, d);
  // Sums of a tile in float32, of tiles in double.
  AlignedBuffer<float> product(size(d * d));
  for (std::int64_t first = 0; first < x.rows; first += kTile) {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t rows = std::min(kTile, x.rows - first);
    const Matrix centred(ctx.workspace.take<float>(size(rows * d)).data(), rows, d);
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      for (std::int64_t j = 0; j < d; ++j) {
        centred.row(t)[j] = static_cast<float>(x.row(first + t)[j] - out.mean[size(j)]);
      }
    });
    kernels::gemm(exact, true, false, 1, centred, centred, 0, {product.data(), d, d});
    for (std::size_t i = 0; i < product.size(); ++i) covariance.data[i] += product[i];
  }
  double variance = 0;
  for (double& v : covariance.data) v /= static_cast<double>(x.rows);
  for (std::int64_t j = 0; j < d; ++j) variance += covariance.at(j, j) / static_cast<double>(d);
  for (double ridge = 1e-9;; ridge *= 10) {
    DMatrix lifted = covariance;
    for (std::int64_t j = 0; j < d; ++j) lifted.at(j, j) += ridge * variance + 1e-30;
    try {
      out.factor = cholesky(std::move(lifted));
      return out;
    } catch (const Error&) {
      if (ridge > 0.1) throw;
    }
  }
}

void sample_gaussian(Context& ctx, const Gaussian& gaussian, std::uint64_t seed, Matrix x) {
  Context exact = ctx.with(Activations::F32);
  const std::int64_t d = x.cols;
  AlignedBuffer<float> factor(gaussian.factor.data.size());
  std::transform(gaussian.factor.data.begin(), gaussian.factor.data.end(), factor.begin(),
                 [](double v) { return static_cast<float>(v); });
  for (std::int64_t first = 0; first < x.rows; first += kTile) {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t rows = std::min(kTile, x.rows - first);
    const Matrix z(ctx.workspace.take<float>(size(rows * d)).data(), rows, d);
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      const auto row = static_cast<std::uint64_t>(first + t);
      std::seed_seq seeds{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U),
                          static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32U)};
      std::mt19937_64 rng(seeds);
      fill_normal(rng, z.row(t), d);
      for (std::int64_t j = 0; j < d; ++j) {
        x.row(first + t)[j] = static_cast<float>(gaussian.mean[size(j)]);
      }
    });
    kernels::gemm(exact, false, true, 1, z, {factor.data(), d, d}, 1, x.slice(first, rows));
  }
}

LayerData gaussian_layer(Context& ctx, const models::Mlp& mlp, const LayerData& real,
                         std::uint64_t seed) {
  LayerData data;
  data.d_model = real.d_model;
  data.n_fit = real.n_fit;
  data.n_choose = real.n_choose;
  data.sink.resize(real.sink.size());
  data.x = AlignedBuffer<float>(real.x.size());
  data.y = AlignedBuffer<float>(real.y.size());
  const Matrix x(data.x.data(), data.n_tokens(), data.d_model);
  sample_gaussian(ctx, fit_gaussian(ctx, real.inputs().slice(0, real.n_fit)), seed, x);
  forward_rows(ctx, mlp, x, {data.y.data(), data.n_tokens(), data.d_model});
  require<InputError>(normalise(ctx, data),
                      "the MLP gives the same output for all Gaussian inputs: there is no variance "
                      "to explain");
  return data;
}

}  // namespace moesaic::converter::study
