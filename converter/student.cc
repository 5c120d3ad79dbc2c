#include "converter/student.h"

#include <algorithm>
#include <cmath>

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

// Gate, up and down row of neurons [first, first + n), interleaved as in the file.
AlignedBuffer<std::byte> pack_neurons(const Neurons& neurons, std::int64_t first, std::int64_t n,
                                      DType dtype) {
  const std::int64_t d = neurons.d_model;
  const std::int64_t bytes = row_bytes(dtype, d);
  AlignedBuffer<std::byte> out(static_cast<std::size_t>(3 * n * bytes));
  for (std::int64_t i = 0; i < n; ++i) {
    const ConstMatrix parts[3] = {neurons.gate(), neurons.up(), neurons.down()};
    for (std::int64_t p = 0; p < 3; ++p) {
      kernels::quantize_row(dtype, {parts[p].row(first + i), static_cast<std::size_t>(d)},
                            out.data() + (3 * i + p) * bytes);
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

double active_fraction(const LayerPlan& plan, std::int64_t d_model, std::int64_t d_ff) {
  if (plan.dense) return 1;
  const std::int64_t n_experts = d_ff - plan.n_shared;
  const std::int64_t used = 3 * d_model * (plan.n_shared + plan.n_active) +
                            plan.router_rank * (d_model + n_experts) +
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

models::PackedSecretMoe pack(const Student& s, DType expert_dtype, DType router_dtype) {
  const std::int64_t d = s.neurons.d_model;
  models::PackedSecretMoe out;
  out.phi = s.neurons.phi;
  out.n_active = s.plan.n_active;
  out.d_model = d;
  out.n_shared = s.plan.n_shared;
  out.n_experts = s.n_experts();
  out.router_rank = s.plan.router_rank;
  out.bypass_rank = s.plan.bypass_rank;
  out.expert_dtype = expert_dtype;
  out.router_dtype = router_dtype;
  out.shared = pack_neurons(s.neurons, 0, out.n_shared, expert_dtype);
  out.experts = pack_neurons(s.neurons, out.n_shared, out.n_experts, expert_dtype);
  out.router_v = pack_rows({s.router_v.data(), out.router_rank, d}, router_dtype);
  out.router_u = pack_rows({s.router_u.data(), out.n_experts, out.router_rank}, router_dtype);
  out.bypass_q = pack_rows({s.bypass_q.data(), out.bypass_rank, d}, router_dtype);
  out.bypass_p =
      pack_rows({s.bypass_p.data(), out.bypass_rank == 0 ? 0 : d, out.bypass_rank}, router_dtype);
  out.expert_mean = copy(s.mean.span().subspan(static_cast<std::size_t>(out.n_shared)));
  out.router_bias = copy(s.router_bias.span());
  out.bias = copy(s.bias.span());
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

void select(Context& ctx, const Student& s, ConstMatrix x, Matrix scores, Matrix mask) {
  // The runtime routes in float32 whatever the activation precision of the fit.
  Context exact{ctx.pool, ctx.workspace, ctx.tally, Activations::F32};
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t n_experts = s.n_experts();
  const std::int64_t rank = s.plan.router_rank;
  Matrix z(ctx.workspace.take<float>(static_cast<std::size_t>(x.rows * rank)).data(), x.rows, rank);
  kernels::gemm(exact, false, true, 1, x, {s.router_v.data(), rank, s.neurons.d_model}, 0, z);
  kernels::gemm(exact, false, true, 1, z, {s.router_u.data(), n_experts, rank}, 0, scores);
  const int n_threads = ctx.pool.n_threads();
  const auto k = static_cast<std::size_t>(s.plan.n_active);
  const auto n = static_cast<std::size_t>(n_experts);
  const auto ids = ctx.workspace.take<std::int32_t>(k * static_cast<std::size_t>(n_threads));
  const auto keys = ctx.workspace.take<std::uint32_t>(n * static_cast<std::size_t>(n_threads));
  ctx.pool.run([&](int thread) {
    const auto t = static_cast<std::size_t>(thread);
    const Range rows = split(x.rows, n_threads, thread);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      float* score = scores.row(row);
      for (std::size_t i = 0; i < n; ++i) score[i] += s.router_bias[i];
      const auto chosen = ids.subspan(t * k, k);
      kernels::top_k({score, n}, chosen, keys.subspan(t * n, n));
      std::fill_n(mask.row(row), n, 0.0F);
      for (const std::int32_t id : chosen) mask.row(row)[id] = 1.0F;
    }
  });
}

}  // namespace moesaic::converter
