#include "converter/stream.h"

#include <algorithm>

namespace moesaic::converter {
namespace {

constexpr std::int64_t kWindows =
    4;  // windows per attention pass: GEMMs of 2,048 rows at n_ctx 512
constexpr std::int64_t kTile = 2048;  // rows per MLP pass

}  // namespace

Stream::Stream(models::Transformer& model, std::span<const std::int32_t> tokens, std::int64_t n_ctx)
    : model_(model),
      n_tokens_(static_cast<std::int64_t>(tokens.size())),
      d_model_(model.config().d_model),
      n_ctx_(n_ctx),
      r_(tokens.size() * static_cast<std::size_t>(model.config().d_model)),
      cache_(1, kWindows, n_ctx, model.config().n_kv_heads, model.config().head_dim) {
  for (std::int64_t slot = 0; slot < kWindows; ++slot) {
    for (std::int64_t pos = 0; pos < n_ctx; ++pos) {
      slots_.push_back(static_cast<std::int32_t>(slot));
      positions_.push_back(static_cast<std::int32_t>(pos));
    }
  }
  model.embed(tokens, r());
}

void Stream::attention(int layer) {
  for (std::int64_t first = 0; first < n_tokens_; first += kWindows * n_ctx_) {
    const std::int64_t rows = std::min(kWindows * n_ctx_, n_tokens_ - first);
    const auto n = static_cast<std::size_t>(rows);
    model_.attention_block(layer, {std::span(slots_).first(n), std::span(positions_).first(n)},
                           cache_.layer(0), r().slice(first, rows));
  }
}

void Stream::mlp_input(int layer, Matrix x) { model_.mlp_input(layer, r(), x); }

void Stream::mlp(int layer, const models::Mlp& mlp) {
  Context& ctx = model_.context();
  for (std::int64_t first = 0; first < n_tokens_; first += kTile) {
    const std::int64_t rows = std::min(kTile, n_tokens_ - first);
    const Workspace::Scope scope(ctx.workspace);
    const auto elements = static_cast<std::size_t>(rows * d_model_);
    const Matrix x(ctx.workspace.take<float>(elements).data(), rows, d_model_);
    const Matrix y(ctx.workspace.take<float>(elements).data(), rows, d_model_);
    model_.mlp_input(layer, r().slice(first, rows), x);
    models::mlp_forward(ctx, mlp, {.x = x}, y);
    model_.add_mlp_output(layer, y, r().slice(first, rows));
  }
}

void Stream::add_mlp_output(int layer, Matrix y) { model_.add_mlp_output(layer, y, r()); }

void forward_rows(Context& ctx, const models::Mlp& mlp, ConstMatrix x, Matrix y) {
  for (std::int64_t first = 0; first < x.rows; first += kTile) {
    const std::int64_t rows = std::min(kTile, x.rows - first);
    models::mlp_forward(ctx, mlp, {.x = x.slice(first, rows)}, y.slice(first, rows));
  }
}

}  // namespace moesaic::converter
