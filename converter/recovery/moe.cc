#include "converter/recovery/moe.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// to[j] += Σ_t m[t, j], threads splitting the columns.
template <class T>
void add_rows(Context& ctx, MatrixView<const T> m, std::span<T> to) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range cols = split(m.cols, n_threads, thread, 16);
    for (std::int64_t t = 0; t < m.rows; ++t) {
      const T* row = m.row(t);
      for (std::int64_t j = cols.begin; j < cols.end; ++j) to[size(j)] += row[j];
    }
  });
}

}  // namespace

template <class T>
MoeParameters<T>::MoeParameters(const MoeShape& s)
    : w_gate(size(s.n_neurons() * s.d_model)),
      w_up(w_gate.size()),
      w_down(w_gate.size()),
      bypass_q(size(s.bypass_rank * s.d_model)),
      bypass_p(bypass_q.size()),
      bias(size(s.d_model)),
      router_v(size(s.router_rank * s.d_model)),
      router_u(size(s.n_experts * s.router_rank)),
      router_bias(size(s.n_experts)) {}

template <class T>
std::vector<std::span<T>> MoeParameters<T>::tensors() {
  return {w_gate.span(), w_up.span(),     w_down.span(),   bypass_q.span(),   bypass_p.span(),
          bias.span(),   router_v.span(), router_u.span(), router_bias.span()};
}

template <class P>
MoeLayer<P>::MoeLayer(const MoeShape& shape, MoeParameters<Scalar>& parameters,
                      std::vector<Scalar> mean)
    : shape_(shape), parameters_(parameters), mean_(std::move(mean)) {
  require<ShapeError>(mean_.size() == size(shape.n_neurons()), "MoE layer: {} means, expected {}",
                      mean_.size(), shape.n_neurons());
}

template <class P>
void MoeLayer<P>::refresh(Context& ctx) {
  const MoeShape& s = shape_;
  const auto take = [&](const AlignedBuffer<Scalar>& from, std::int64_t rows, std::int64_t cols,
                        Storage<Operand>& to) {
    to_operand(ctx, matrix(from, rows, cols), to.reshape(rows, cols));
  };
  take(parameters_.w_gate, s.n_neurons(), s.d_model, w_gate_);
  take(parameters_.w_up, s.n_neurons(), s.d_model, w_up_);
  take(parameters_.w_down, s.n_neurons(), s.d_model, w_down_);
  take(parameters_.bypass_q, s.bypass_rank, s.d_model, bypass_q_);
  take(parameters_.bypass_p, s.d_model, s.bypass_rank, bypass_p_);
  take(parameters_.router_u, s.n_experts, s.router_rank, router_u_);
  down_norm_.resize(size(s.n_neurons()));
  const MatrixView<const Scalar> down =
      matrix(std::as_const(parameters_.w_down), s.n_neurons(), s.d_model);
  for_each_row(ctx, s.n_neurons(), [&](std::int64_t i, int) {
    const Scalar* row = down.row(i);
    down_norm_[size(i)] = std::sqrt(std::inner_product(row, row + s.d_model, row, Scalar(0)));
  });
}

// From one token's products and scores: everything that the tape keeps of it. `gate`, `up` and
// `scores` are overwritten. scratch: 3 · n_neurons elements.
template <class P>
void MoeLayer<P>::activate_row(const RouterTraining& router, std::int64_t t, bool keep_contribution,
                               Scalar* gate, Scalar* up, Scalar* scores, std::span<Scalar> scratch,
                               std::span<std::int32_t> ids, MoeTape<P>& tape) const {
  const std::int64_t n = shape_.n_neurons();
  const std::int64_t n_experts = shape_.n_experts;
  const std::int64_t n_shared = shape_.n_shared;
  const std::int64_t k = shape_.n_active;
  Scalar* on = scratch.data();
  Scalar* slope = on + n;
  Scalar* centred = slope + n;
  for (std::int64_t i = 0; i < n_experts; ++i) scores[i] += parameters_.router_bias[size(i)];
  choose_top(scores, n_experts, k, ids.data());
  std::fill_n(on, n_shared, Scalar(1));
  std::fill_n(on + n_shared, n_experts, Scalar(0));
  for (std::int64_t j = 0; j < k; ++j) on[n_shared + ids[size(j)]] = 1;

  activation_slope(shape_.phi, gate, n, gate, slope);
  for (std::int64_t i = 0; i < n; ++i) {
    centred[i] = gate[i] * up[i] - mean_[size(i)];
    slope[i] *= on[i] * up[i];
    gate[i] *= on[i];
    up[i] = on[i] * centred[i];
  }
  to_operand(up, n, tape.f.view().row(t));
  to_operand(slope, n, tape.slope_gate.view().row(t));
  to_operand(gate, n, tape.slope_up.view().row(t));

  if (router.straight_through > 0 && k > 0 && k < n_experts) {
    // θ and the scores' spread, then κ; slope and gate are free.
    Scalar chosen = scores[ids[0]];
    for (std::int64_t j = 1; j < k; ++j) chosen = std::min(chosen, scores[ids[size(j)]]);
    Scalar below = 0;
    bool any = false;
    Scalar sum = 0;
    Scalar square = 0;
    for (std::int64_t i = 0; i < n_experts; ++i) {
      sum += scores[i];
      square += scores[i] * scores[i];
      if (on[n_shared + i] != 0) continue;
      below = any ? std::max(below, scores[i]) : scores[i];
      any = true;
    }
    const Scalar count = static_cast<Scalar>(n_experts);
    const Scalar variance = std::max(Scalar(0), square / count - sum / count * (sum / count));
    const Scalar width =
        std::max(Scalar(1e-20), static_cast<Scalar>(router.width) * std::sqrt(variance));
    const Scalar threshold = (chosen + below) / 2;
    for (std::int64_t i = 0; i < n_experts; ++i) {
      slope[i] = std::max(Scalar(0), 1 - std::abs(scores[i] - threshold) / width) / width;
    }
    to_operand(slope, n_experts, tape.kappa.view().row(t));
    to_operand(centred + n_shared, n_experts, tape.centred.view().row(t));
  }

  double squared = 0;
  for (std::int64_t i = 0; i < n_experts; ++i) {
    const Scalar c = std::abs(centred[n_shared + i]) * down_norm_[size(n_shared + i)];
    gate[i] = c;
    scores[i] -= c;
    squared += static_cast<double>(scores[i]) * static_cast<double>(scores[i]);
  }
  if (keep_contribution) to_operand(gate, n_experts, tape.contribution.view().row(t));
  to_operand(scores, n_experts, tape.gap.view().row(t));
  tape.squared_gap[size(t)] = squared;
}

template <class P>
void MoeLayer<P>::forward(Context& ctx, const RouterTraining& router, MatrixView<const Scalar> x,
                          std::int64_t contribution_rows, MoeTape<P>& tape,
                          MatrixView<Scalar> y) const {
  const Workspace::Scope scope(ctx.workspace);
  const MoeShape& s = shape_;
  const std::int64_t m = x.rows;
  const std::int64_t n = s.n_neurons();
  const MatrixView<Operand> xo = tape.x.reshape(m, s.d_model);
  to_operand(ctx, x, xo);
  tape.f.reshape(m, n);
  tape.slope_gate.reshape(m, n);
  tape.slope_up.reshape(m, n);
  tape.gap.reshape(m, s.n_experts);
  tape.contribution.reshape(contribution_rows, s.n_experts);
  tape.squared_gap.resize(size(m));
  if (router.straight_through > 0) {
    tape.centred.reshape(m, s.n_experts);
    tape.kappa.reshape(m, s.n_experts);
  }

  const auto gate = take_matrix<Scalar>(ctx, m, n);
  const auto up = take_matrix<Scalar>(ctx, m, n);
  multiply(ctx, false, true, constant(xo), constant(w_gate_.view()), false, gate);
  multiply(ctx, false, true, constant(xo), constant(w_up_.view()), false, up);
  // The runtime routes in full precision.
  const auto z = take_matrix<Scalar>(ctx, m, s.router_rank);
  const auto scores = take_matrix<Scalar>(ctx, m, s.n_experts);
  multiply(ctx, false, true, x,
           matrix(std::as_const(parameters_.router_v), s.router_rank, s.d_model), false, z);
  multiply(ctx, false, true, constant(z),
           matrix(std::as_const(parameters_.router_u), s.n_experts, s.router_rank), false, scores);
  to_operand(ctx, constant(z), tape.z.reshape(m, s.router_rank));

  const auto n_threads = static_cast<std::size_t>(ctx.pool.n_threads());
  const auto scratch = ctx.workspace.take<Scalar>(n_threads * size(3 * n));
  const auto ids = ctx.workspace.take<std::int32_t>(n_threads * size(s.n_active));
  for_each_row(ctx, m, [&](std::int64_t t, int thread) {
    const auto own = static_cast<std::size_t>(thread);
    activate_row(router, t, t < contribution_rows, gate.row(t), up.row(t), scores.row(t),
                 scratch.subspan(own * size(3 * n), size(3 * n)),
                 ids.subspan(own * size(s.n_active), size(s.n_active)), tape);
    std::copy(parameters_.bias.begin(), parameters_.bias.end(), y.row(t));
  });
  multiply(ctx, false, false, constant(tape.f.view()), constant(w_down_.view()), true, y);
  if (s.bypass_rank > 0) {
    const auto qx = take_matrix<Scalar>(ctx, m, s.bypass_rank);
    multiply(ctx, false, true, constant(xo), constant(bypass_q_.view()), false, qx);
    to_operand(ctx, constant(qx), tape.qx.reshape(m, s.bypass_rank));
    multiply(ctx, false, true, constant(tape.qx.view()), constant(bypass_p_.view()), true, y);
  }
}

template <class P>
double MoeLayer<P>::backward(Context& ctx, const RouterTraining& router,
                             MatrixView<const Scalar> dy, std::span<const Scalar> weight,
                             double total_weight, MoeTape<P>& tape, MoeParameters<Scalar>& gradient,
                             MatrixView<Scalar> dx) const {
  const Workspace::Scope scope(ctx.workspace);
  const MoeShape& s = shape_;
  const std::int64_t m = dy.rows;
  const std::int64_t n = s.n_neurons();
  const std::int64_t d = s.d_model;
  const MatrixView<const Operand> xo = tape.x.view();
  const auto dyo = take_matrix<Operand>(ctx, m, d);
  to_operand(ctx, dy, dyo);

  add_rows(ctx, dy, gradient.bias.span());
  multiply(ctx, true, false, constant(tape.f.view()), constant(dyo), true,
           matrix(gradient.w_down, n, d));
  const auto df = take_matrix<Scalar>(ctx, m, n);
  multiply(ctx, false, true, constant(dyo), constant(w_down_.view()), false, df);

  // gap becomes the scores' gradient, the slopes those of the gate and up products.
  const double unit = 1 / (total_weight * router.scale);
  const auto n_threads = static_cast<std::size_t>(ctx.pool.n_threads());
  const auto scratch = ctx.workspace.take<Scalar>(n_threads * size(2 * n));
  for_each_row(ctx, m, [&](std::int64_t t, int thread) {
    Scalar* row = scratch.data() + static_cast<std::size_t>(thread) * size(2 * n);
    Scalar* other = row + n;
    const Scalar* own_df = df.row(t);
    for (const Storage<Operand>* slope : {&tape.slope_gate, &tape.slope_up}) {
      from_operand(slope->view().row(t), n, row);
      for (std::int64_t i = 0; i < n; ++i) row[i] *= own_df[i];
      to_operand(row, n, slope->view().row(t));
    }
    Operand* gap = tape.gap.view().row(t);
    from_operand(gap, s.n_experts, row);
    const auto factor =
        static_cast<Scalar>(2 * router.auxiliary * unit * static_cast<double>(weight[size(t)]));
    for (std::int64_t i = 0; i < s.n_experts; ++i) row[i] *= factor;
    if (router.straight_through > 0 && s.n_active > 0 && s.n_active < s.n_experts) {
      Scalar* effect = df.row(t) + s.n_shared;  // no longer needed but for this
      from_operand(tape.centred.view().row(t), s.n_experts, other);
      for (std::int64_t i = 0; i < s.n_experts; ++i) effect[i] *= other[i];
      from_operand(tape.kappa.view().row(t), s.n_experts, other);
      Scalar sum = 0;
      Scalar mean = 0;
      for (std::int64_t i = 0; i < s.n_experts; ++i) {
        sum += other[i];
        mean += other[i] * effect[i];
      }
      mean = sum > 0 ? mean / sum : 0;
      const auto share = static_cast<Scalar>(router.straight_through);
      for (std::int64_t i = 0; i < s.n_experts; ++i) {
        row[i] += share * other[i] * (effect[i] - mean);
      }
    }
    to_operand(row, s.n_experts, gap);
  });
  multiply(ctx, true, false, constant(tape.slope_gate.view()), xo, true,
           matrix(gradient.w_gate, n, d));
  multiply(ctx, true, false, constant(tape.slope_up.view()), xo, true, matrix(gradient.w_up, n, d));
  if (dx.data != nullptr) {
    multiply(ctx, false, false, constant(tape.slope_gate.view()), constant(w_gate_.view()), false,
             dx);
    multiply(ctx, false, false, constant(tape.slope_up.view()), constant(w_up_.view()), true, dx);
  }
  if (s.bypass_rank > 0) {
    const std::int64_t q = s.bypass_rank;
    multiply(ctx, true, false, constant(dyo), constant(tape.qx.view()), true,
             matrix(gradient.bypass_p, d, q));
    const auto dq = take_matrix<Scalar>(ctx, m, q);
    multiply(ctx, false, false, constant(dyo), constant(bypass_p_.view()), false, dq);
    const MatrixView<Operand> dqo = take_matrix<Operand>(ctx, m, q);
    to_operand(ctx, constant(dq), dqo);
    multiply(ctx, true, false, constant(dqo), xo, true, matrix(gradient.bypass_q, q, d));
    if (dx.data != nullptr) {
      multiply(ctx, false, false, constant(dqo), constant(bypass_q_.view()), true, dx);
    }
  }

  const std::int64_t r = s.router_rank;
  const MatrixView<Operand> ds = tape.gap.view();
  multiply(ctx, true, false, constant(ds), constant(tape.z.view()), true,
           matrix(gradient.router_u, s.n_experts, r));
  const auto dz = take_matrix<Scalar>(ctx, m, r);
  multiply(ctx, false, false, constant(ds), constant(router_u_.view()), false, dz);
  const MatrixView<Operand> dzo = take_matrix<Operand>(ctx, m, r);
  to_operand(ctx, constant(dz), dzo);
  multiply(ctx, true, false, constant(dzo), xo, true, matrix(gradient.router_v, r, d));
  const auto ds_sum = take_matrix<Scalar>(ctx, m, s.n_experts);
  for_each_row(ctx, m,
               [&](std::int64_t t, int) { from_operand(ds.row(t), s.n_experts, ds_sum.row(t)); });
  add_rows(ctx, constant(ds_sum), gradient.router_bias.span());

  double loss = 0;
  for (std::int64_t t = 0; t < m; ++t) {
    loss += static_cast<double>(weight[size(t)]) * tape.squared_gap[size(t)];
  }
  return loss * unit;
}

template struct MoeParameters<float>;
template struct MoeParameters<double>;
template class MoeLayer<Float64>;
template class MoeLayer<Float32>;
template class MoeLayer<Bfloat16>;

}  // namespace moesaic::converter
