#include "converter/stream.h"

#include <algorithm>
#include <vector>

#include "converter/divergence.h"
#include "engine/kv_cache.h"
#include "kernels/base/aligned_buffer.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kWindows =
    4;  // windows per attention pass: GEMMs of 2,048 rows at n_ctx 512
constexpr std::int64_t kTile = 2048;  // rows per MLP pass

Matrix take(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {ctx.workspace.take<float>(static_cast<std::size_t>(rows * cols)).data(), rows, cols};
}

class HostStream : public Stream {
 public:
  HostStream(const Passes& passes, std::span<const std::int32_t> tokens, std::int64_t n_ctx);

  std::int64_t n_tokens() const override { return n_tokens_; }
  void attention(int layer) override;
  void mlp_rows(int layer, const MlpRows& rows) override;
  void mlp(int layer, const models::Mlp& mlp) override;
  void add_mlp_output(int layer, Matrix y) override { model_.add_mlp_output(layer, y, r()); }
  void read(std::int64_t first, Matrix rows) override;
  void assign(const Stream& other) override {
    std::copy_n(host(other).r_.data(), r_.size(), r_.data());
  }
  double divergence(const Stream& other) override {
    return mean_divergence(model_, r(), host(other).r());
  }

 private:
  static const HostStream& host(const Stream& stream) {
    return dynamic_cast<const HostStream&>(stream);
  }
  Matrix r() { return {r_.data(), n_tokens_, d_model_}; }
  ConstMatrix r() const { return {r_.data(), n_tokens_, d_model_}; }

  const Passes& passes_;
  models::Transformer& model_;
  std::int64_t n_tokens_, d_model_, n_ctx_;
  AlignedBuffer<float> r_;                       // [n_tokens, d_model]
  engine::HostKvCache cache_;                    // one layer of kWindows windows
  std::vector<std::int32_t> slots_, positions_;  // places of kWindows windows
};

HostStream::HostStream(const Passes& passes, std::span<const std::int32_t> tokens,
                       std::int64_t n_ctx)
    : passes_(passes),
      model_(passes.model()),
      n_tokens_(static_cast<std::int64_t>(tokens.size())),
      d_model_(model_.config().d_model),
      n_ctx_(n_ctx),
      r_(tokens.size() * static_cast<std::size_t>(d_model_)),
      cache_(1, kWindows, n_ctx, model_.config().n_kv_heads, model_.config().head_dim) {
  for (std::int64_t slot = 0; slot < kWindows; ++slot) {
    for (std::int64_t pos = 0; pos < n_ctx; ++pos) {
      slots_.push_back(static_cast<std::int32_t>(slot));
      positions_.push_back(static_cast<std::int32_t>(pos));
    }
  }
  model_.embed(tokens, r());
}

void HostStream::attention(int layer) {
  for (std::int64_t first = 0; first < n_tokens_; first += kWindows * n_ctx_) {
    const std::int64_t rows = std::min(kWindows * n_ctx_, n_tokens_ - first);
    const auto n = static_cast<std::size_t>(rows);
    model_.attention_block(layer, {std::span(slots_).first(n), std::span(positions_).first(n)},
                           cache_.layer(0), r().slice(first, rows));
  }
}

void HostStream::mlp_rows(int layer, const MlpRows& rows) {
  Context& ctx = model_.context();
  const std::int64_t n = rows.x.rows;
  for (std::int64_t first = 0; first < n; first += kTile) {
    const Workspace::Scope scope(ctx.workspace);
    const Matrix tile = take(ctx, std::min(kTile, n - first), d_model_);
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      std::copy_n(r().row((first + i) * n_tokens_ / n), d_model_, tile.row(i));
      if (rows.r.rows > 0) std::copy_n(tile.row(i), d_model_, rows.r.row(first + i));
    }
    model_.mlp_input(layer, tile, rows.x.slice(first, tile.rows));
  }
  if (rows.y.rows > 0) forward_rows(ctx, passes_.own_mlp(layer), rows.x, rows.y);
}

void HostStream::mlp(int layer, const models::Mlp& mlp) {
  Context& ctx = model_.context();
  for (std::int64_t first = 0; first < n_tokens_; first += kTile) {
    const std::int64_t rows = std::min(kTile, n_tokens_ - first);
    const Workspace::Scope scope(ctx.workspace);
    const Matrix x = take(ctx, rows, d_model_), y = take(ctx, rows, d_model_);
    model_.mlp_input(layer, r().slice(first, rows), x);
    models::mlp_forward(ctx, mlp, {.x = x}, y);
    model_.add_mlp_output(layer, y, r().slice(first, rows));
  }
}

void HostStream::read(std::int64_t first, Matrix rows) {
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    std::copy_n(r().row(first + i), d_model_, rows.row(i));
  }
}

}  // namespace

std::unique_ptr<Stream> HostPasses::stream(std::span<const std::int32_t> tokens,
                                           std::int64_t n_ctx) {
  return std::make_unique<HostStream>(*this, tokens, n_ctx);
}

void forward_rows(Context& ctx, const models::Mlp& mlp, ConstMatrix x, Matrix y) {
  for (std::int64_t first = 0; first < x.rows; first += kTile) {
    const std::int64_t rows = std::min(kTile, x.rows - first);
    models::mlp_forward(ctx, mlp, {.x = x.slice(first, rows)}, y.slice(first, rows));
  }
}

}  // namespace moesaic::converter
