#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "kernels/cpu/matvec.h"
#include "kernels/cpu/panel_product.h"
#include "kernels/cpu/target.h"
#include "kernels/linear.h"
#include "kernels/panels.h"
#include "kernels/rms_norm.h"

namespace moesaic::kernels {
namespace {

// Up to here every thread makes all tiles for itself: quicker than to wait for the others.
constexpr std::int64_t kOwnTileElements = 4096;

// Bytes that a waiting thread fetches at most: a quarter of a second-level cache, and longer than
// threads wait for each other.
constexpr std::int64_t kReadAhead = 256 * 1024;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

bool uses_panels(const Context& ctx, const WeightView& w) {
  return ctx.activations == Activations::Q16 && (w.panels != nullptr || w.rows == 0);
}

void check_shapes(const LinearInput& input, const LinearOutput& output) {
  const ConstMatrix& x = input.x;
  const auto norm_length = static_cast<std::int64_t>(input.norm.size());
  require<ShapeError>(norm_length == 0 || norm_length == x.cols,
                      "linear: norm of {} weights for X [{}, {}], expected {}", norm_length, x.rows,
                      x.cols, x.cols);
  check_linear_shapes(output.w, x, output.y);
}

/// The tiles of X in the forms that the products want, made inside a run of the pool.
class Tiles {
 public:
  Tiles(Context& ctx, const LinearInput& input, std::span<const LinearOutput> outputs)
      : ctx_(ctx), input_(input), n_threads_(ctx.pool.n_threads()) {
    for (const LinearOutput& output : outputs) {
      if (output.w.rows > 0) wanted_[index(tile_kind(output.w.dtype))] = true;
    }
    shared_ = n_threads_ > 1 && input.x.rows * input.x.cols > kOwnTileElements;
    const std::int64_t copies = shared_ ? 1 : n_threads_;
    for (const TileKind kind : {TileKind::Int16, TileKind::BFloat16}) {
      if (!wanted_[index(kind)]) continue;
      bytes_[index(kind)] = input.x.rows * tile_token_bytes(kind, input.x.cols);
      tiles_[index(kind)] =
          ctx.workspace.take<std::byte>(size(copies * bytes_[index(kind)])).data();
    }
    if (!input.norm.empty()) {
      normed_ = ctx.workspace.take<float>(size(n_threads_ * kTileTokens * input.x.cols)).data();
    }
  }

  /// All threads of the pool call it; returns when the tiles can be read.
  void make(int thread) {
    const std::int64_t n_tiles = (input_.x.rows + kTileTokens - 1) / kTileTokens;
    const Range own = shared_ ? split(n_tiles, n_threads_, thread) : Range{0, n_tiles};
    for (std::int64_t tile = own.begin; tile < own.end; ++tile) {
      const std::int64_t first = tile * kTileTokens;
      const std::int64_t n = std::min(kTileTokens, input_.x.rows - first);
      ConstMatrix x = input_.x.slice(first, n);
      if (!input_.norm.empty()) {
        const Matrix to(normed_ + thread * kTileTokens * x.cols, n, x.cols);
        // One row at a time runs on the calling thread.
        for (std::int64_t t = 0; t < n; ++t) {
          rms_norm(ctx_, x.slice(t, 1), input_.norm, input_.eps, to.slice(t, 1));
        }
        x = to;
      }
      for (const TileKind kind : {TileKind::Int16, TileKind::BFloat16}) {
        if (!wanted_[index(kind)]) continue;
        make_tile(kind, x, place(kind, thread) + first * tile_token_bytes(kind, x.cols));
      }
    }
    if (shared_) ctx_.pool.barrier();
  }

  const std::byte* tiles(TileKind kind, int thread) const { return place(kind, thread); }

 private:
  static std::size_t index(TileKind kind) { return kind == TileKind::Int16 ? 0 : 1; }
  std::byte* place(TileKind kind, int thread) const {
    return tiles_[index(kind)] + (shared_ ? 0 : thread * bytes_[index(kind)]);
  }

  Context& ctx_;
  const LinearInput& input_;
  int n_threads_;
  bool shared_;
  std::array<bool, 2> wanted_{};
  std::array<std::int64_t, 2> bytes_{};
  std::array<std::byte*, 2> tiles_{};
  float* normed_ = nullptr;  // [n_threads, kTileTokens, cols]
};

PanelProduct product_of(const LinearOutput& output, Range range, const std::byte* tiles) {
  return {.panels = output.w.panels,
          .dtype = output.w.dtype,
          .rows = output.w.rows,
          .cols = output.w.cols,
          .range = range,
          .tiles = tiles,
          .n_tokens = output.y.rows,
          .y = output.y,
          .accumulate = output.accumulate};
}

// A thread's part of the matrices of a linear_group(): equal bytes of all of them in a row.
class Share {
 public:
  Share(std::int64_t total_bytes, int n_threads, int thread)
      : begin_(total_bytes * thread / n_threads), end_(total_bytes * (thread + 1) / n_threads) {}

  /// Its panels of the next matrix.
  Range next(const WeightView& w) {
    const std::int64_t bytes = panel_layout(w.dtype, w.cols).panel_bytes();
    const std::int64_t n = n_panels(w);
    // Panel i is whose share its first byte lies in.
    const auto first_at = [&](std::int64_t at) {
      return std::clamp<std::int64_t>((at - before_ + bytes - 1) / bytes, 0, n);
    };
    const Range own{first_at(std::max(begin_, before_)), first_at(std::max(end_, before_))};
    before_ += n * bytes;
    return own;
  }

 private:
  std::int64_t begin_, end_;
  std::int64_t before_ = 0;
};

// The same for a gated_linear(): the same rows of both, so that a thread can finish what it began.
Range gated_share(const WeightView& w_gate, int n_threads, int thread) {
  return split(n_panels(w_gate), n_threads, thread);
}

void group_panels(Context& ctx, const LinearInput& input, std::span<const LinearOutput> outputs) {
  const Workspace::Scope scope(ctx.workspace);
  Tiles tiles(ctx, input, outputs);
  std::int64_t total = 0;
  for (const LinearOutput& output : outputs) total += panel_bytes(output.w);
  ctx.pool.run([&](int thread) {
    tiles.make(thread);
    Share share(total, ctx.pool.n_threads(), thread);
    for (const LinearOutput& output : outputs) {
      if (output.w.rows == 0) continue;
      const Range own = share.next(output.w);
      if (own.size() == 0) continue;
      multiply_panels(product_of(output, own, tiles.tiles(tile_kind(output.w.dtype), thread)));
    }
  });
}

}  // namespace

ConstMatrix normed(Context& ctx, const LinearInput& input) {
  if (input.norm.empty()) return input.x;
  const Matrix to(ctx.workspace.take<float>(size(input.x.rows * input.x.cols)).data(), input.x.rows,
                  input.x.cols);
  rms_norm(ctx, input.x, input.norm, input.eps, to);
  return to;
}

void linear_group(Context& ctx, const LinearInput& input, std::span<const LinearOutput> outputs,
                  Traffic traffic) {
  bool panels = true;
  for (const LinearOutput& output : outputs) {
    if (output.w.rows == 0) continue;
    check_shapes(input, output);
    panels = panels && uses_panels(ctx, output.w);
  }
  if (input.x.rows == 0) return;
  obey_target_environment();
  if (panels) {
    group_panels(ctx, input, outputs);
    for (const LinearOutput& output : outputs) ctx.tally.add(traffic, panel_bytes(output.w));
    return;
  }
  const Workspace::Scope scope(ctx.workspace);
  const ConstMatrix x = normed(ctx, input);
  for (const LinearOutput& output : outputs) {
    if (output.w.rows == 0) continue;
    linear(ctx, output.w, x, output.y, traffic, output.accumulate);
  }
}

void gated_linear(Context& ctx, const LinearInput& input, Activation phi, const WeightView& w_gate,
                  const WeightView& w_up, Matrix h, Traffic traffic) {
  const Workspace::Scope scope(ctx.workspace);
  const Matrix up(ctx.workspace.take<float>(size(h.rows * h.cols)).data(), h.rows, h.cols);
  const std::array<LinearOutput, 2> outputs = {LinearOutput{w_gate, h}, LinearOutput{w_up, up}};
  for (const LinearOutput& output : outputs) check_shapes(input, output);
  if (h.rows == 0 || h.cols == 0) return;
  if (!uses_panels(ctx, w_gate) || !uses_panels(ctx, w_up)) {
    linear_group(ctx, input, outputs, traffic);
    gated_activation(ctx, phi, h, up, h);
    return;
  }
  obey_target_environment();
  Tiles tiles(ctx, input, outputs);
  ctx.pool.run([&](int thread) {
    tiles.make(thread);
    const Range own = gated_share(w_gate, ctx.pool.n_threads(), thread);
    if (own.size() == 0) return;
    for (const LinearOutput& output : outputs) {
      multiply_panels(product_of(output, own, tiles.tiles(tile_kind(output.w.dtype), thread)));
    }
    const std::int64_t first = own.begin * kPanelRows;
    const std::int64_t n = std::min(own.end * kPanelRows, h.cols) - first;
    for (std::int64_t t = 0; t < h.rows; ++t) {
      const Matrix gate_part(h.row(t) + first, 1, n);
      gated_activation(ctx, phi, gate_part, ConstMatrix(up.row(t) + first, 1, n), gate_part);
    }
  });
  ctx.tally.add(traffic, panel_bytes(w_gate) + panel_bytes(w_up));
}

void read_ahead(Context& ctx, const Upcoming& upcoming) {
  const int n_threads = ctx.pool.n_threads();
  if (ctx.activations != Activations::Q16 || n_threads == 1) return;
  std::int64_t total = 0;
  for (const WeightView& w : upcoming.weights) {
    if (w.rows > 0 && w.panels == nullptr) return;
    total += panel_bytes(w);
  }
  for (int thread = 0; thread < n_threads; ++thread) {
    Share share(total, n_threads, thread);
    for (const WeightView& w : upcoming.weights) {
      if (w.rows == 0) continue;
      const Range own = upcoming.gated ? gated_share(w, n_threads, thread) : share.next(w);
      if (own.size() == 0) continue;
      const std::int64_t bytes = panel_layout(w.dtype, w.cols).panel_bytes();
      ctx.pool.set_read_ahead(
          thread, {w.panels + own.begin * bytes, size(std::min(own.size() * bytes, kReadAhead))});
      break;
    }
  }
}

}  // namespace moesaic::kernels
