#include "converter/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/logits.h"
#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kBlock = 64;  // rows of logits at a time: 67 MB for a vocabulary of 262,144

}  // namespace

double mean_divergence(models::Transformer& model, ConstMatrix dense, ConstMatrix other) {
  Context& ctx = model.context();
  const std::int64_t d = dense.cols;
  const std::int64_t vocab = model.config().vocab_size;
  const std::int64_t n = dense.rows / kJudgedStep;
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
        std::copy_n(from.row((first + i) * kJudgedStep + kJudgedStep - 1), d, r.row(i));
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
  return checked_divergence(model, std::accumulate(kl.begin(), kl.end(), 0.0) /
                                       static_cast<double>(std::max<std::int64_t>(1, n)));
}

double checked_divergence(const models::Transformer& model, double mean) {
  require<FormatError>(std::isfinite(mean),
                       "{}: gives NaN or infinite logits on the calibration text",
                       model.checkpoint().file->path().string());
  return mean;
}

Substitution::Substitution(Passes& passes, std::span<const std::int32_t> tokens, std::int64_t n_ctx)
    : passes_(passes),
      dense_(passes.stream(tokens, n_ctx)),
      end_(passes.stream(tokens, n_ctx)),
      other_(passes.stream(tokens, n_ctx)) {
  for (int l = 0; l < passes.model().config().n_layers; ++l) {
    end_->attention(l);
    end_->mlp(l, passes.own_mlp(l));
  }
}

double Substitution::divergence(int layer, const std::function<void(Stream&)>& replace) {
  other_->assign(*dense_);
  replace(*other_);
  for (int l = layer + 1; l < passes_.model().config().n_layers; ++l) {
    other_->attention(l);
    other_->mlp(l, passes_.own_mlp(l));
  }
  return end_->divergence(*other_);
}

}  // namespace moesaic::converter
