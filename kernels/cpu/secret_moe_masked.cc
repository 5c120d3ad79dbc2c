#include <algorithm>

#include "kernels/cpu/onednn.h"
#include "kernels/cpu/secret_moe_paths.h"
#include "kernels/quant.h"

namespace moesaic::kernels {
namespace {

// Neurons per tile: three unpacked tiles and the activations of a few hundred tokens stay near the
// second-level cache.
constexpr std::int64_t kTileNeurons = 96;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// What depends on the precision of the products.
struct Float32 {
  using Element = float;
  static void unpack(DType dtype, const std::byte* row, std::span<float> to) {
    dequantize_row(dtype, row, to);
  }
  static void multiply(const Gemm& g, const float* a, const float* b, float* c) {
    gemm_f32(g, a, b, c);
  }
  static void convert(const float* from, std::size_t n, float* to) { std::copy_n(from, n, to); }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static void unpack(DType dtype, const std::byte* row, std::span<std::uint16_t> to) {
    dequantize_row_bf16(dtype, row, to);
  }
  static void multiply(const Gemm& g, const std::uint16_t* a, const std::uint16_t* b, float* c) {
    gemm_bf16(g, a, b, c);
  }
  static void convert(const float* from, std::size_t n, std::uint16_t* to) {
    to_bf16_bits(from, n, to);
  }
};

template <class Precision>
class Scratch {
 public:
  using Element = typename Precision::Element;

  // One thread's.
  struct Part {
    Element* gate;        // [kTileNeurons, d_model]
    Element* up;          // [kTileNeurons, d_model]
    Element* down;        // [kTileNeurons, d_model]
    float* gate_product;  // [n_tokens, kTileNeurons]
    float* up_product;    // [n_tokens, kTileNeurons]
    Element* h;           // [n_tokens, kTileNeurons]
  };

  Scratch(Workspace& w, int n_threads, std::int64_t n_tokens, std::int64_t d_model)
      : tile_(kTileNeurons * d_model),
        product_(kTileNeurons * n_tokens),
        tiles_(w.take<Element>(size(3 * n_threads * tile_)).data()),
        products_(w.take<float>(size(2 * n_threads * product_)).data()),
        h_(w.take<Element>(size(n_threads * product_)).data()) {}

  Part part(int thread) const {
    Element* tile = tiles_ + 3 * thread * tile_;
    float* product = products_ + 2 * thread * product_;
    return {tile,    tile + tile_,       tile + 2 * tile_,
            product, product + product_, h_ + thread * product_};
  }

 private:
  std::int64_t tile_;
  std::int64_t product_;
  Element* tiles_;
  float* products_;
  Element* h_;
};

/// y += the neurons `range` of `rows` for the tokens that selected them; all do if ids is null.
template <class Precision>
void add_range(Context& ctx, Activation phi, const WeightView& rows, Range range, const float* mean,
               const std::int32_t* ids, std::int64_t k, const typename Precision::Element* x,
               const typename Scratch<Precision>::Part& s, Matrix y) {
  const std::int64_t d_model = y.cols;
  for (std::int64_t first = range.begin; first < range.end; first += kTileNeurons) {
    const std::int64_t n = std::min(kTileNeurons, range.end - first);
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t row = 3 * (first + j);
      const std::int64_t at = j * d_model;
      Precision::unpack(rows.dtype, rows.row(row), {s.gate + at, size(d_model)});
      Precision::unpack(rows.dtype, rows.row(row + 1), {s.up + at, size(d_model)});
      Precision::unpack(rows.dtype, rows.row(row + 2), {s.down + at, size(d_model)});
    }
    const Gemm in{.trans_b = true,
                  .m = y.rows,
                  .n = n,
                  .k = d_model,
                  .lda = d_model,
                  .ldb = d_model,
                  .ldc = n};
    Precision::multiply(in, x, s.gate, s.gate_product);
    Precision::multiply(in, x, s.up, s.up_product);
    for (std::int64_t t = 0; t < y.rows; ++t) {
      float* h = s.gate_product + t * n;
      // One row at a time runs on the calling thread.
      gated_activation(ctx, phi, ConstMatrix(h, 1, n), ConstMatrix(s.up_product + t * n, 1, n),
                       Matrix(h, 1, n));
      if (ids != nullptr) {
        float masked[kTileNeurons] = {};
        const std::int32_t* chosen = ids + t * k;
        const std::int32_t* from =
            std::lower_bound(chosen, chosen + k, static_cast<std::int32_t>(first));
        for (; from != chosen + k && *from < first + n; ++from) {
          masked[*from - first] = h[*from - first] - mean[*from];
        }
        std::copy_n(masked, n, h);
      }
      Precision::convert(h, size(n), s.h + t * n);
    }
    Precision::multiply({.m = y.rows,
                         .n = d_model,
                         .k = n,
                         .lda = n,
                         .ldb = d_model,
                         .ldc = d_model,
                         .accumulate = true},
                        s.h, s.down, y.data);
  }
}

template <class Precision>
void masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
            std::span<const std::int32_t> ids, Matrix y) {
  using Element = typename Precision::Element;
  const std::int64_t d_model = layer.d_model();
  const std::int64_t n_tokens = x.rows;
  const std::int64_t n_shared = layer.n_shared();
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  const auto operand = ctx.workspace.take<Element>(size(n_tokens * d_model));
  for (std::int64_t t = 0; t < n_tokens; ++t) {
    Precision::convert(x.row(t), size(d_model), operand.data() + t * d_model);
  }
  const auto partial = ctx.workspace.take<float>(size(n_threads * n_tokens * d_model));
  const Scratch<Precision> all(ctx.workspace, n_threads, n_tokens, d_model);
  ctx.pool.run([&](int thread) {
    const Matrix sum(partial.data() + thread * n_tokens * d_model, n_tokens, d_model);
    std::fill_n(sum.data, n_tokens * d_model, 0.0f);
    const Range part = split(n_shared + layer.n_experts(), n_threads, thread, 16);
    const std::int64_t border = std::clamp(n_shared, part.begin, part.end);
    const auto s = all.part(thread);
    add_range<Precision>(ctx, layer.phi, layer.shared, {part.begin, border}, nullptr, nullptr, 0,
                         operand.data(), s, sum);
    add_range<Precision>(ctx, layer.phi, layer.experts,
                         {std::max<std::int64_t>(border - n_shared, 0), part.end - n_shared},
                         layer.expert_mean.data(), ids.data(), layer.n_active, operand.data(), s,
                         sum);
  });
  add_partials(ctx, partial, y);
  ctx.tally.add(Traffic::Experts, layer.shared.bytes() + layer.experts.bytes());
}

}  // namespace

void secret_moe_masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
                       std::span<const std::int32_t> ids, Matrix y) {
  if (ctx.activations == Activations::BF16) {
    masked<BFloat16>(ctx, layer, x, ids, y);
  } else {
    masked<Float32>(ctx, layer, x, ids, y);
  }
}

}  // namespace moesaic::kernels
