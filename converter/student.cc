#include "converter/student.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "converter/rounding.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"
#include "kernels/quant.h"
#include "kernels/top_k.h"

namespace moesaic::converter {
namespace {

// Packs rows of `src` (row r of the result is src row r) one after the other.
AlignedBuffer<std::byte> pack_rows(ConstMatrix src, DType dtype) {
  const std::int64_t bytes = row_bytes(dtype, src.cols);
  AlignedBuffer<std::byte> out(static_cast<std::size_t>(src.rows * bytes));
  for (std::int64_t r = 0; r < src.rows; ++r) {
    kernels::quantize_row(dtype, {src.row(r), static_cast<std::size_t>(src.cols)},
                          out.data() + r * bytes);
  }
  return out;
}

// Neurons [first, first + n) as the files have them: of each `block` all gate rows, all up rows,
// all down rows.
AlignedBuffer<std::byte> pack_neurons(const Neurons& neurons, std::int64_t first, std::int64_t n,
                                      std::int64_t block, DType dtype) {
  const std::int64_t d = neurons.d_model;
  const std::int64_t bytes = row_bytes(dtype, d);
  const ConstMatrix parts[3] = {neurons.gate(), neurons.up(), neurons.down()};
  AlignedBuffer<std::byte> out(static_cast<std::size_t>(3 * n * bytes));
  std::byte* to = out.data();
  for (std::int64_t begin = first; begin < first + n; begin += block) {
    for (const ConstMatrix& part : parts) {
      for (std::int64_t i = begin; i < begin + block; ++i, to += bytes) {
        kernels::quantize_row(dtype, {part.row(i), static_cast<std::size_t>(d)}, to);
      }
    }
  }
  return out;
}

AlignedBuffer<float> copy(std::span<const float> src) {
  AlignedBuffer<float> out(src.size());
  std::copy(src.begin(), src.end(), out.begin());
  return out;
}

AlignedBuffer<float> unpack_matrix(const WeightView& w, std::string_view name,
                                   std::string_view part) {
  AlignedBuffer<float> out(static_cast<std::size_t>(w.rows * w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    const std::span<float> row(out.data() + r * w.cols, static_cast<std::size_t>(w.cols));
    kernels::dequantize_row(w.dtype, w.row(r), row);
    require<FormatError>(
        std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); }),
        "{}.{}: row {} holds a NaN or infinity, expected finite weights", name, part, r);
  }
  return out;
}

}  // namespace

std::int64_t n_experts(const LayerPlan& plan, std::int64_t d_ff) {
  return (d_ff - plan.n_shared) / plan.block + plan.n_clones;
}

double active_fraction(const LayerPlan& plan, std::int64_t d_model, std::int64_t d_ff) {
  if (plan.dense) return 1;
  const std::int64_t used = 3 * d_model * (plan.n_shared + plan.n_active * plan.block) +
                            plan.router_rank * (d_model + n_experts(plan, d_ff)) +
                            2 * plan.bypass_rank * d_model;
  return static_cast<double>(used) / static_cast<double>(3 * d_model * d_ff);
}

Neurons unpack(const models::DenseMlp& mlp, std::string_view name) {
  Neurons out;
  out.phi = mlp.phi;
  out.d_model = mlp.w_gate.cols;
  out.n = mlp.w_gate.rows;
  out.w_gate = unpack_matrix(mlp.w_gate, name, "ffn_gate.weight");
  out.w_up = unpack_matrix(mlp.w_up, name, "ffn_up.weight");
  const AlignedBuffer<float> down =
      unpack_matrix(mlp.w_down, name, "ffn_down.weight");  // [d_model, n]
  out.w_down = AlignedBuffer<float>(down.size());
  for (std::int64_t j = 0; j < out.d_model; ++j) {
    for (std::int64_t i = 0; i < out.n; ++i) out.w_down[i * out.d_model + j] = down[j * out.n + i];
  }
  return out;
}

models::Mlp view(const PackedStudent& packed) {
  return std::visit([](const auto& layer) -> models::Mlp { return layer.view(); }, packed);
}

namespace {

// What both forms have.
template <class Packed>
Packed pack_parts(const Student& s, DType expert_dtype, DType router_dtype) {
  const std::int64_t d = s.neurons.d_model;
  const std::int64_t n_shared = s.plan.n_shared;
  Packed out;
  out.phi = s.neurons.phi;
  out.n_active = s.plan.n_active;
  out.d_model = d;
  out.n_shared = n_shared;
  out.n_experts = s.n_experts();
  out.router_rank = s.plan.router_rank;
  out.bypass_rank = s.plan.bypass_rank;
  out.expert_dtype = expert_dtype;
  out.router_dtype = router_dtype;
  out.shared = pack_neurons(s.neurons, 0, n_shared, 1, expert_dtype);
  out.experts =
      pack_neurons(s.neurons, n_shared, s.neurons.n - n_shared, s.plan.block, expert_dtype);
  out.router_v = pack_rows({s.router_v.data(), out.router_rank, d}, router_dtype);
  out.router_u = pack_rows({s.router_u.data(), out.n_experts, out.router_rank}, router_dtype);
  out.bypass_q = pack_rows({s.bypass_q.data(), out.bypass_rank, d}, router_dtype);
  out.bypass_p =
      pack_rows({s.bypass_p.data(), out.bypass_rank == 0 ? 0 : d, out.bypass_rank}, router_dtype);
  out.expert_mean = copy(s.mean.span().subspan(static_cast<std::size_t>(n_shared)));
  out.router_bias = copy(s.router_bias.span());
  out.bias = copy(s.bias.span());
  return out;
}

}  // namespace

PackedStudent pack(const Student& s, DType expert_dtype, DType router_dtype) {
  if (s.plan.block == 1) {
    return pack_parts<models::PackedSecretMoe>(s, expert_dtype, router_dtype);
  }
  auto out = pack_parts<models::PackedMixture>(s, expert_dtype, router_dtype);
  out.kind = {};  // glu+low_rank+none
  out.block = s.plan.block;
  return out;
}

void round_inputs_to(Context& ctx, Student& s, const DMatrix& input_factor, DType expert_dtype,
                     DType router_dtype) {
  const std::int64_t d = s.neurons.d_model;
  round_inputs(ctx, {s.neurons.w_gate.data(), s.neurons.n, d}, input_factor, expert_dtype);
  round_inputs(ctx, {s.neurons.w_up.data(), s.neurons.n, d}, input_factor, expert_dtype);
  round_rows({s.router_v.data(), s.plan.router_rank, d}, router_dtype);
  round_rows({s.router_u.data(), s.n_experts(), s.plan.router_rank}, router_dtype);
  round_rows({s.bypass_q.data(), s.plan.bypass_rank, d}, router_dtype);
}

void neuron_activations(Context& ctx, const Neurons& neurons, ConstMatrix x, Matrix h,
                        Matrix scratch) {
  kernels::gemm(ctx, false, true, 1, x, neurons.gate(), 0, h);
  kernels::gemm(ctx, false, true, 1, x, neurons.up(), 0, scratch);
  kernels::gated_activation(ctx, neurons.phi, h, scratch, h);
}

std::vector<float> down_norms(const Neurons& neurons) {
  std::vector<float> norm(static_cast<std::size_t>(neurons.n));
  for (std::int64_t i = 0; i < neurons.n; ++i) {
    const float* row = neurons.down().row(i);
    norm[static_cast<std::size_t>(i)] =
        std::sqrt(std::inner_product(row, row + neurons.d_model, row, 0.0F));
  }
  return norm;
}

void contributions(const Student& s, std::span<const float> norm, const float* h, float* c) {
  auto i = static_cast<std::size_t>(s.plan.n_shared);
  for (std::int64_t e = 0; e < s.n_experts(); ++e) {
    double square = 0;  // of a single neuron its root is |h − μ| ‖w_down‖ to the last bit
    for (std::int64_t j = 0; j < s.plan.block; ++j, ++i) {
      const double part = std::abs(h[i] - s.mean[i]) * norm[i];
      square += part * part;
    }
    c[e] = static_cast<float>(std::sqrt(square));
  }
}

void leave_to_winners(const Student& s, const float* scores, float* c) {
  for (const std::vector<std::int32_t>& family : s.families) {
    const std::int32_t winner =
        *std::max_element(family.begin(), family.end(),
                          [&](std::int32_t a, std::int32_t b) { return scores[a] < scores[b]; });
    for (const std::int32_t e : family) {
      if (e != winner) c[e] = 0;
    }
  }
}

void router_scores(Context& ctx, const Student& s, ConstMatrix x, Matrix scores) {
  // The runtime routes in float32 whatever the activation precision of the fit.
  Context exact = ctx.with(Activations::F32);
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t rank = s.plan.router_rank;
  const Matrix z(ctx.workspace.take<float>(static_cast<std::size_t>(x.rows * rank)).data(), x.rows,
                 rank);
  kernels::gemm(exact, false, true, 1, x, {s.router_v.data(), rank, s.neurons.d_model}, 0, z);
  kernels::gemm(exact, false, true, 1, z, {s.router_u.data(), s.n_experts(), rank}, 0, scores);
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range rows = split(x.rows, n_threads, thread);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      float* score = scores.row(row);
      for (std::size_t i = 0; i < s.router_bias.size(); ++i) score[i] += s.router_bias[i];
    }
  });
}

void select(Context& ctx, const Student& s, ConstMatrix x, Matrix scores, Matrix mask) {
  router_scores(ctx, s, x, scores);
  const Workspace::Scope scope(ctx.workspace);
  const int n_threads = ctx.pool.n_threads();
  const auto k = static_cast<std::size_t>(s.plan.n_active);
  const auto n = static_cast<std::size_t>(s.n_experts());
  const auto ids = ctx.workspace.take<std::int32_t>(k * static_cast<std::size_t>(n_threads));
  const auto keys = ctx.workspace.take<std::uint32_t>(n * static_cast<std::size_t>(n_threads));
  ctx.pool.run([&](int thread) {
    const auto t = static_cast<std::size_t>(thread);
    const Range rows = split(x.rows, n_threads, thread);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const auto chosen = ids.subspan(t * k, k);
      kernels::top_k({scores.row(row), n}, chosen, keys.subspan(t * n, n));
      std::fill_n(mask.row(row), n, 0.0F);
      for (const std::int32_t id : chosen) mask.row(row)[id] = 1.0F;
    }
  });
}

}  // namespace moesaic::converter
