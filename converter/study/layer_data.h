#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "converter/data.h"
#include "converter/linalg.h"
#include "kernels/base/aligned_buffer.h"
#include "models/transformer.h"

namespace moesaic::converter::study {

/// What the students are fed.
enum class Inputs { Real, Gaussian };
/// "real", "gaussian".
std::string_view inputs_name(Inputs inputs);
/// Nothing where the name is none of these.
std::optional<Inputs> inputs_from_name(std::string_view name);

/// Share of variance left unexplained, Σ‖y − ŷ‖² / Σ‖y − ȳ‖², of all judged tokens and of those
/// that are no sinks, each about its own mean.
struct Unexplained {
  double all = 0;
  double without_sinks = 0;
};

/// Inputs and outputs of one dense MLP: rows [0, n_fit) are trained on, the next n_choose choose
/// the learning rate, the rest are held out to judge.
struct LayerData {
  AlignedBuffer<float> x;  // [n_tokens, d_model]
  AlignedBuffer<float> y;  // [n_tokens, d_model] outputs over y_scale
  double y_scale = 1;      // root of the outputs' mean variance per component over the fitted rows
  std::vector<bool> sink;  // [n_tokens]
  std::int64_t d_model = 0;
  std::int64_t n_fit = 0;
  std::int64_t n_choose = 0;

  std::int64_t n_tokens() const { return static_cast<std::int64_t>(sink.size()); }
  std::int64_t n_held_out() const { return n_tokens() - n_fit - n_choose; }
  ConstMatrix inputs() const { return {x.data(), n_tokens(), d_model}; }
  ConstMatrix outputs() const { return {y.data(), n_tokens(), d_model}; }
  /// Of the fitted rows.   [d_model]
  std::vector<double> mean_output() const;
  std::int64_t n_sinks(std::int64_t first, std::int64_t n) const;
  /// Of ŷ [n, d_model] for rows [first, first + n). NaN where nothing varies.
  Unexplained unexplained(std::int64_t first, ConstMatrix y_hat) const;
};

/// A token is a sink where it opens its window, or where its output is more than this many times as
/// long as the median token's (a massive activation).
inline constexpr double kSinkNorm = 10;

/// From x, y and d_model of whole windows of n_ctx tokens, three at least, to the rest: the split
/// (a sixteenth of the windows at the end is held out and half as many before them choose the rate,
/// one each at least), the sinks, y over y_scale. Throws FormatError("NAME gives NaN or infinite
/// values on the text"), InputError (outputs that do not vary).
void finish_layer(Context& ctx, LayerData& data, std::int64_t n_ctx, std::string_view name);

/// Runs the model over the windows as far as `layer` and keeps what its MLP sees and gives, as
/// finish_layer() says. Throws InputError (fewer than three windows; outputs that do not vary),
/// FormatError("FILE: layer N gives NaN or infinite values on the text"), Interrupted.
LayerData collect_layer(models::Transformer& model, const Calibration& text, int layer,
                        engine::Monitor& monitor);

/// Mean and Cholesky factor of the covariance of rows.
struct Gaussian {
  std::vector<double> mean;  // [d]
  DMatrix factor;            // [d, d] lower triangular
};

/// Of the rows of x; where they span fewer dimensions than they have (or fewer rows than columns),
/// with the least multiple of the mean variance, from 1e-9 on, that makes the covariance positive
/// definite.
Gaussian fit_gaussian(Context& ctx, ConstMatrix x);

/// Independent rows μ + L z. The same seed gives the same rows for any number of threads, up to
/// float32 summation order.
void sample_gaussian(Context& ctx, const Gaussian& gaussian, std::uint64_t seed, Matrix x);

/// The layer's answers to a Gaussian with the mean and covariance of real.x's fitted rows (sinks
/// among them), split as `real` is; no token is a sink.
LayerData gaussian_layer(Context& ctx, const models::Mlp& mlp, const LayerData& real,
                         std::uint64_t seed);

}  // namespace moesaic::converter::study
