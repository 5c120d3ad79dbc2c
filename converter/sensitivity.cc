#include "converter/sensitivity.h"

#include <algorithm>
#include <cmath>

#include "converter/divergence.h"
#include "converter/fit.h"
#include "converter/start.h"
#include "converter/stream.h"

namespace moesaic::converter {

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

std::vector<double> measure_sensitivity(Passes& passes, std::span<const std::int32_t> tokens,
                                        std::int64_t n_ctx, const LayerPlan& plan,
                                        const std::vector<bool>& wanted, const Recipe& recipe,
                                        engine::Monitor& monitor) {
  models::Transformer& model = passes.model();
  Context& ctx = model.context();
  const models::Checkpoint& checkpoint = model.checkpoint();
  const int n_layers = model.config().n_layers;
  const auto n_windows = static_cast<std::int64_t>(tokens.size()) / n_ctx;
  const std::int64_t n_judge = std::max<std::int64_t>(1, n_windows / 6);
  const auto fit_tokens = tokens.first(static_cast<std::size_t>((n_windows - n_judge) * n_ctx));
  const auto judge_tokens = tokens.subspan(fit_tokens.size());

  const std::unique_ptr<Stream> fit = passes.stream(fit_tokens, n_ctx);
  Substitution judge(passes, judge_tokens, n_ctx);
  const std::int64_t d = model.config().d_model;
  AlignedBuffer<float> r(static_cast<std::size_t>(fit->n_tokens() * d));
  AlignedBuffer<float> x(r.size()), y(r.size());
  AlignedBuffer<float> x_judge(static_cast<std::size_t>(judge.dense().n_tokens() * d));
  AlignedBuffer<float> y_judge(x_judge.size());
  const Matrix mr(r.data(), fit->n_tokens(), d);
  const Matrix mx(x.data(), fit->n_tokens(), d);
  const Matrix my(y.data(), fit->n_tokens(), d);
  const Matrix mxj(x_judge.data(), judge.dense().n_tokens(), d);
  const Matrix myj(y_judge.data(), judge.dense().n_tokens(), d);
  std::vector<double> out;
  for (int l = 0; l < n_layers; ++l) {
    monitor.check();
    const models::Mlp& mlp = passes.own_mlp(l);
    fit->attention(l);
    judge.attention(l);
    if (!wanted[static_cast<std::size_t>(l)]) {
      fit->mlp(l, mlp);
      judge.pass(l);
      out.push_back(0);
      monitor.advance(l + 1, "");
      continue;
    }
    fit->mlp_rows(l, {mr, mx, my});
    const std::vector<float> weight = token_weights(model, l, mr, my);
    LayerSample sample{mx, my, weight, mx.rows};
    const Neurons teacher = unpack(std::get<models::DenseMlp>(mlp),
                                   fmt::format("{}: blk.{}", checkpoint.file->path().string(), l));
    judge.dense().mlp_rows(l, {.x = mxj});
    Student student = start_from_neurons(ctx, teacher, sample, plan, recipe.router_ridge);
    fit_outputs(ctx, student, sample, recipe.router_ridge, recipe.output_ridge, DType::F32);
    fit->add_mlp_output(l, my);  // overwrites what it adds
    student_forward(ctx, student, mxj, myj);
    out.push_back(judge.divergence(l, [&](Stream& other) { other.add_mlp_output(l, myj); }));
    judge.pass(l);
    monitor.advance(l + 1, fmt::format("KL {:.4f}", out.back()));
  }
  return out;
}

}  // namespace moesaic::converter
