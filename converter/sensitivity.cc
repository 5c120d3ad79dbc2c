#include "converter/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "converter/fit.h"
#include "converter/stream.h"
#include "engine/logits.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kStride =
    4;  // every fourth position is judged: neighbours say much the same
constexpr std::int64_t kBlock = 64;  // rows of logits at a time: 67 MB for a vocabulary of 262,144

// Mean KL divergence between the distributions that two final residual streams lead to.
double mean_kl(models::Transformer& model, ConstMatrix dense, ConstMatrix other) {
  Context& ctx = model.context();
  const std::int64_t d = dense.cols;
  const std::int64_t vocab = model.config().vocab_size;
  const std::int64_t n = dense.rows / kStride;
  std::vector<double> kl(static_cast<std::size_t>(n));
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t rows = std::min(kBlock, n - first);
    const auto take = [&](std::int64_t cols) {
      return Matrix(ctx.workspace.take<float>(static_cast<std::size_t>(rows * cols)).data(), rows,
                    cols);
    };
    const Matrix r = take(d);
    const Matrix p = take(vocab);
    const Matrix q = take(vocab);
    const auto logits = [&](ConstMatrix from, Matrix to) {
      for (std::int64_t i = 0; i < rows; ++i) {
        std::copy_n(from.row((first + i) * kStride + kStride - 1), d, r.row(i));
      }
      model.head(r, to);
    };
    logits(dense, p);
    logits(other, q);
    const int n_threads = ctx.pool.n_threads();
    ctx.pool.run([&](int thread) {
      const Range range = split(rows, n_threads, thread);
      for (std::int64_t i = range.begin; i < range.end; ++i) {
        const auto size = static_cast<std::size_t>(vocab);
        const std::span<const float> from(p.row(i), size);
        const std::span<const float> to(q.row(i), size);
        const double z_from = engine::log_sum_exp(from);
        const double z_to = engine::log_sum_exp(to);
        kl[static_cast<std::size_t>(first + i)] =
            std::isfinite(z_from) && std::isfinite(z_to)
                ? engine::kl_divergence(from, z_from, to, z_to)
                : std::numeric_limits<double>::quiet_NaN();
      }
    });
  }
  const double mean = std::accumulate(kl.begin(), kl.end(), 0.0) /
                      static_cast<double>(std::max<std::int64_t>(1, n));
  require<FormatError>(std::isfinite(mean),
                       "{}: gives NaN or infinite logits on the calibration text",
                       model.checkpoint().file->path().string());
  return mean;
}

}  // namespace

std::vector<float> token_weights(models::Transformer& model, int layer, ConstMatrix r,
                                 ConstMatrix y) {
  constexpr std::int64_t kTile = 2048;
  Context& ctx = model.context();
  const std::int64_t d = r.cols;
  const auto square = [d](const float* v) {
    double s = 0;
    for (std::int64_t i = 0; i < d; ++i) s += static_cast<double>(v[i]) * v[i];
    return s;
  };
  std::vector<float> weight(static_cast<std::size_t>(r.rows));
  double total = 0;
  for (std::int64_t first = 0; first < r.rows; first += kTile) {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t rows = std::min(kTile, r.rows - first);
    const auto copy = [&](ConstMatrix from) {
      const Matrix to(ctx.workspace.take<float>(static_cast<std::size_t>(rows * d)).data(), rows,
                      d);
      for (std::int64_t t = 0; t < rows; ++t) std::copy_n(from.row(first + t), d, to.row(t));
      return to;
    };
    const Matrix after = copy(r);
    model.add_mlp_output(layer, copy(y), after);
    for (std::int64_t t = 0; t < rows; ++t) {
      double scale = square(after.row(t));
      if (model.config().post_norms) scale *= square(y.row(first + t)) / static_cast<double>(d);
      const double w = 1 / std::max(scale, 1e-20);
      weight[static_cast<std::size_t>(first + t)] = static_cast<float>(w);
      total += w;
    }
  }
  require<FormatError>(std::isfinite(total),
                       "{}: layer {} gives NaN or infinite values on the calibration text",
                       model.checkpoint().file->path().string(), layer);
  const auto unit = static_cast<float>(static_cast<double>(weight.size()) / total);
  for (float& w : weight) w *= unit;
  return weight;
}

std::vector<double> measure_sensitivity(models::Transformer& model,
                                        std::span<const std::int32_t> tokens, std::int64_t n_ctx,
                                        const LayerPlan& plan, const Recipe& recipe,
                                        engine::Monitor& monitor) {
  Context& ctx = model.context();
  const models::Checkpoint& checkpoint = model.checkpoint();
  const int n_layers = model.config().n_layers;
  const auto n_windows = static_cast<std::int64_t>(tokens.size()) / n_ctx;
  const std::int64_t n_judge = std::max<std::int64_t>(1, n_windows / 6);
  const auto fit_tokens = tokens.first(static_cast<std::size_t>((n_windows - n_judge) * n_ctx));
  const auto judge_tokens = tokens.subspan(fit_tokens.size());

  Stream fit(model, fit_tokens, n_ctx);
  Stream judge(model, judge_tokens, n_ctx);
  Stream end(model, judge_tokens, n_ctx);  // the dense model's last residual stream
  for (int l = 0; l < n_layers; ++l) {
    end.attention(l);
    end.mlp(l, checkpoint.layers[static_cast<std::size_t>(l)].mlp);
  }
  Stream other(model, judge_tokens, n_ctx);
  const std::int64_t d = model.config().d_model;
  AlignedBuffer<float> x(static_cast<std::size_t>(fit.n_tokens() * d));
  AlignedBuffer<float> y(x.size());
  AlignedBuffer<float> x_judge(static_cast<std::size_t>(judge.n_tokens() * d));
  AlignedBuffer<float> y_judge(x_judge.size());
  const Matrix mx(x.data(), fit.n_tokens(), d);
  const Matrix my(y.data(), fit.n_tokens(), d);
  const Matrix mxj(x_judge.data(), judge.n_tokens(), d);
  const Matrix myj(y_judge.data(), judge.n_tokens(), d);
  std::vector<double> out;
  for (int l = 0; l < n_layers; ++l) {
    monitor.check();
    const models::Mlp& mlp = checkpoint.layers[static_cast<std::size_t>(l)].mlp;
    fit.attention(l);
    fit.mlp_input(l, mx);
    forward_rows(ctx, mlp, mx, my);
    const std::vector<float> weight = token_weights(model, l, fit.r(), my);
    LayerSample sample{mx, my, weight, fit.n_tokens()};
    const Neurons teacher = unpack(std::get<models::DenseMlp>(mlp),
                                   fmt::format("{}: blk.{}", checkpoint.file->path().string(), l));
    judge.attention(l);
    judge.mlp_input(l, mxj);
    Student student = start_from_neurons(ctx, teacher, sample, plan, recipe.router_ridge);
    fit_outputs(ctx, student, sample, recipe.router_ridge, recipe.output_ridge, DType::F32);
    fit.add_mlp_output(l, my);  // overwrites what it adds
    std::copy_n(judge.r().data, x_judge.size(), other.r().data);
    student_forward(ctx, student, mxj, myj);
    other.add_mlp_output(l, myj);
    for (int m = l + 1; m < n_layers; ++m) {
      other.attention(m);
      other.mlp(m, checkpoint.layers[static_cast<std::size_t>(m)].mlp);
    }
    out.push_back(mean_kl(model, end.r(), other.r()));
    judge.mlp(l, mlp);
    monitor.advance(l + 1, fmt::format("KL {:.4f}", out.back()));
  }
  return out;
}

}  // namespace moesaic::converter
