#include "converter/distill.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "converter/adam.h"
#include "kernels/linear.h"

namespace moesaic::converter {
namespace {

Matrix take(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {ctx.workspace.take<float>(static_cast<std::size_t>(rows * cols)).data(), rows, cols};
}

// φ(g) and φ'(g).
struct Slope {
  float value;
  float derivative;
};

Slope activate_with_slope(kernels::Activation phi, float g) {
  if (phi == kernels::Activation::Silu) {
    const float s = 1.0F / (1.0F + std::exp(-g));
    return {g * s, s * (1.0F + g * (1.0F - s))};
  }
  constexpr float kRoot = 0.7978845608F;  // √(2/π)
  const float t = std::tanh(kRoot * (g + 0.044715F * g * g * g));
  const float inner = kRoot * (1.0F + 3.0F * 0.044715F * g * g);
  return {0.5F * g * (1.0F + t), 0.5F * (1.0F + t) + 0.5F * g * (1.0F - t * t) * inner};
}

template <class Fn>
void parallel(Context& ctx, std::int64_t n, Fn&& fn) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range range = split(n, n_threads, thread, 16);
    for (std::int64_t i = range.begin; i < range.end; ++i) fn(i);
  });
}

// dst[j] = Σ_t m[t, j]
void sum_rows(Context& ctx, ConstMatrix m, float* dst) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range cols = split(m.cols, n_threads, thread, 16);
    std::fill(dst + cols.begin, dst + cols.end, 0.0F);
    for (std::int64_t t = 0; t < m.rows; ++t) {
      const float* row = m.row(t);
      for (std::int64_t j = cols.begin; j < cols.end; ++j) dst[j] += row[j];
    }
  });
}

// Σ ω‖v − v̄‖² / Σ ω of the rows of v; of rows that are all alike a millionth of their mean square,
// since it is divided by.
double weighted_variance(ConstMatrix v, std::span<const float> weight) {
  std::vector<double> sum(static_cast<std::size_t>(v.cols));
  double square = 0;
  double total = 0;
  for (std::int64_t t = 0; t < v.rows; ++t) {
    const double w = weight[static_cast<std::size_t>(t)];
    total += w;
    for (std::int64_t j = 0; j < v.cols; ++j) {
      const double x = v.row(t)[j];
      sum[static_cast<std::size_t>(j)] += w * x;
      square += w * x * x;
    }
  }
  double mean_square = 0;
  for (const double x : sum) mean_square += x * x / total;
  return std::max({1e-30, 1e-6 * square / total, (square - mean_square) / total});
}

// Neurons stand in a student as a part of their own.
template <class Tensors>
Tensors tensors_of(auto& neurons, auto& rest) {
  return {neurons.w_gate.span(), neurons.w_up.span(),  neurons.w_down.span(),
          rest.bias.span(),      rest.bypass_q.span(), rest.bypass_p.span(),
          rest.router_v.span(),  rest.router_u.span(), rest.router_bias.span()};
}

}  // namespace

StudentTensors tensors(Student& s) { return tensors_of<StudentTensors>(s.neurons, s); }

std::array<std::span<const float>, kStudentTensors> tensors(const Student& s) {
  return tensors_of<std::array<std::span<const float>, kStudentTensors>>(s.neurons, s);
}

StudentTensors tensors(StudentGradients& g) { return tensors_of<StudentTensors>(g, g); }

LossScales loss_scales(Context& ctx, const Student& student, const LayerSample& sample) {
  LossScales scales;
  scales.y = weighted_variance(sample.y.slice(0, sample.n_fit), sample.weight);
  // From the first rows; only the balance of the two losses hangs on it.
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t rows = std::min<std::int64_t>(sample.n_fit, 2048);
  Matrix h = take(ctx, rows, student.neurons.n);
  neuron_activations(ctx, student.neurons, sample.x.slice(0, rows), h,
                     take(ctx, rows, student.neurons.n));
  Matrix c = take(ctx, rows, student.n_experts());
  const std::vector<float> norm = down_norms(student.neurons);
  for (std::int64_t t = 0; t < rows; ++t) contributions(student, norm, h.row(t), c.row(t));
  scales.c = weighted_variance(c, sample.weight);
  return scales;
}

BatchOrder::BatchOrder(std::int64_t n_rows, std::int64_t batch, std::uint64_t seed)
    : order_(static_cast<std::size_t>(n_rows)),
      batch_(static_cast<std::size_t>(batch)),
      next_(order_.size()),
      rng_(seed) {
  std::iota(order_.begin(), order_.end(), 0);
}

std::span<const std::int32_t> BatchOrder::next() {
  if (next_ + batch_ > order_.size()) {
    for (std::size_t i = order_.size() - 1; i > 0; --i) {
      std::swap(order_[i], order_[rng_() % (i + 1)]);
    }
    next_ = 0;
  }
  next_ += batch_;
  return std::span<const std::int32_t>(order_).subspan(next_ - batch_, batch_);
}

double distill_schedule(std::int64_t step, std::int64_t steps) {
  return cosine_schedule(step, steps, std::max<std::int64_t>(1, steps / 20));
}

StudentGradients make_gradients(const Student& s) {
  StudentGradients g;
  g.w_gate = AlignedBuffer<float>(s.neurons.w_gate.size());
  g.w_up = AlignedBuffer<float>(s.neurons.w_up.size());
  g.w_down = AlignedBuffer<float>(s.neurons.w_down.size());
  g.router_v = AlignedBuffer<float>(s.router_v.size());
  g.router_u = AlignedBuffer<float>(s.router_u.size());
  g.router_bias = AlignedBuffer<float>(s.router_bias.size());
  g.bypass_q = AlignedBuffer<float>(s.bypass_q.size());
  g.bypass_p = AlignedBuffer<float>(s.bypass_p.size());
  g.bias = AlignedBuffer<float>(s.bias.size());
  return g;
}

void student_gradients(Context& ctx, const Student& s, ConstMatrix x, ConstMatrix y,
                       std::span<const float> weight, const LossScales& scales, double auxiliary,
                       StudentGradients& out) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t m = x.rows;
  const std::int64_t d = s.neurons.d_model;
  const std::int64_t n = s.neurons.n;
  const std::int64_t n_shared = s.plan.n_shared;
  const std::int64_t n_experts = s.n_experts();
  const std::int64_t r = s.plan.router_rank;
  const std::int64_t q = s.plan.bypass_rank;
  const ConstMatrix v(s.router_v.data(), r, d);
  const ConstMatrix u(s.router_u.data(), n_experts, r);
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  const std::vector<float> norm = down_norms(s.neurons);

  // Forward: gate and up products, scores, selection.
  Matrix gate = take(ctx, m, n);
  Matrix up = take(ctx, m, n);
  Matrix f = take(ctx, m, n);
  Matrix mask = take(ctx, m, n_experts);
  Matrix z = take(ctx, m, r);
  Matrix scores = take(ctx, m, n_experts);
  Matrix target = take(ctx, m, n_experts);
  kernels::gemm(ctx, false, true, 1, x, s.neurons.gate(), 0, gate);
  kernels::gemm(ctx, false, true, 1, x, s.neurons.up(), 0, up);
  kernels::gemm(ctx, false, true, 1, x, v, 0, z);
  kernels::gemm(ctx, false, true, 1, z, u, 0, scores);
  select(ctx, s, x, mask, mask);

  // f = the activations that count; the slopes stay in gate (∂f/∂gate) and up (∂f/∂up); scores
  // becomes the auxiliary loss's gradient.
  std::vector<double> aux_by_row(static_cast<std::size_t>(m));
  const double aux_unit = 1.0 / (total * scales.c);
  parallel(ctx, m, [&](std::int64_t t) {
    const double w = weight[static_cast<std::size_t>(t)];
    const float* on = mask.row(t);
    for (std::int64_t i = 0; i < n; ++i) {
      const Slope a = activate_with_slope(s.neurons.phi, gate.row(t)[i]);
      f.row(t)[i] = a.value * up.row(t)[i];
      gate.row(t)[i] = a.derivative * up.row(t)[i];
      up.row(t)[i] = a.value;
    }
    float* score = scores.row(t);
    float* c = target.row(t);
    for (std::int64_t e = 0; e < n_experts; ++e) {
      score[e] += s.router_bias[static_cast<std::size_t>(e)];
    }
    contributions(s, norm, f.row(t), c);
    leave_to_winners(s, score, c);
    double loss = 0;
    for (std::int64_t e = 0; e < n_experts; ++e) {
      const double gap = static_cast<double>(score[e]) - c[e];
      loss += w * gap * gap;
      score[e] = static_cast<float>(2 * auxiliary * aux_unit * w * gap);
      for (std::int64_t i = n_shared + e * s.plan.block; i < n_shared + (e + 1) * s.plan.block;
           ++i) {
        f.row(t)[i] = on[e] * (f.row(t)[i] - s.mean[static_cast<std::size_t>(i)]);
        gate.row(t)[i] *= on[e];
        up.row(t)[i] *= on[e];
      }
    }
    aux_by_row[static_cast<std::size_t>(t)] = loss;
  });
  out.auxiliary_loss = std::accumulate(aux_by_row.begin(), aux_by_row.end(), 0.0) * aux_unit;

  Matrix dy = take(ctx, m, d);
  Matrix qx = take(ctx, m, q);
  for (std::int64_t t = 0; t < m; ++t) std::copy_n(s.bias.data(), d, dy.row(t));
  kernels::gemm(ctx, false, false, 1, f, s.neurons.down(), 1, dy);
  if (q > 0) {
    kernels::gemm(ctx, false, true, 1, x, {s.bypass_q.data(), q, d}, 0, qx);
    kernels::gemm(ctx, false, true, 1, qx, {s.bypass_p.data(), d, q}, 1, dy);
  }
  const double unit = 1.0 / (total * scales.y);
  std::vector<double> loss_by_row(static_cast<std::size_t>(m));
  parallel(ctx, m, [&](std::int64_t t) {
    const double w = weight[static_cast<std::size_t>(t)];
    double loss = 0;
    for (std::int64_t j = 0; j < d; ++j) {
      const double gap = static_cast<double>(dy.row(t)[j]) - y.row(t)[j];
      loss += w * gap * gap;
      dy.row(t)[j] = static_cast<float>(2 * unit * w * gap);
    }
    loss_by_row[static_cast<std::size_t>(t)] = loss;
  });
  out.output_loss = std::accumulate(loss_by_row.begin(), loss_by_row.end(), 0.0) * unit;

  // Backward.
  sum_rows(ctx, dy, out.bias.data());
  kernels::gemm(ctx, true, false, 1, f, dy, 0, {out.w_down.data(), n, d});
  kernels::gemm(ctx, false, true, 1, dy, s.neurons.down(), 0, f);  // f is now ∂L/∂f
  parallel(ctx, m, [&](std::int64_t t) {
    for (std::int64_t i = 0; i < n; ++i) {
      gate.row(t)[i] *= f.row(t)[i];
      up.row(t)[i] *= f.row(t)[i];
    }
  });
  kernels::gemm(ctx, true, false, 1, gate, x, 0, {out.w_gate.data(), n, d});
  kernels::gemm(ctx, true, false, 1, up, x, 0, {out.w_up.data(), n, d});
  if (q > 0) {
    kernels::gemm(ctx, true, false, 1, dy, qx, 0, {out.bypass_p.data(), d, q});
    kernels::gemm(ctx, false, false, 1, dy, {s.bypass_p.data(), d, q}, 0, qx);
    kernels::gemm(ctx, true, false, 1, qx, x, 0, {out.bypass_q.data(), q, d});
  }
  sum_rows(ctx, scores, out.router_bias.data());
  kernels::gemm(ctx, true, false, 1, scores, z, 0, {out.router_u.data(), n_experts, r});
  kernels::gemm(ctx, false, false, 1, scores, u, 0, z);
  kernels::gemm(ctx, true, false, 1, z, x, 0, {out.router_v.data(), r, d});
}

std::int64_t distill_steps(const DistillOptions& options, std::int64_t n_fit) {
  if (n_fit == 0) return 0;
  const std::int64_t batch = std::min(options.batch, n_fit);
  return static_cast<std::int64_t>(options.passes * static_cast<double>(n_fit) /
                                   static_cast<double>(batch));
}

void distill(Context& ctx, Student& student, const LayerSample& sample,
             const DistillOptions& options, engine::Monitor& monitor) {
  const std::int64_t d = student.neurons.d_model;
  const std::int64_t batch = std::min(options.batch, sample.n_fit);
  const std::int64_t steps = distill_steps(options, sample.n_fit);
  if (steps == 0) return;
  const LossScales scales = loss_scales(ctx, student, sample);

  StudentGradients gradients = make_gradients(student);
  std::vector<AdamTensor> adam;
  adam.reserve(kStudentTensors);
  const StudentTensors values = tensors(student), slopes = tensors(gradients);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    adam.emplace_back(values[i], slopes[i],
                      i < kFirstStudentRouter ? options.learning_rate : options.router_rate);
  }

  BatchOrder order(sample.n_fit, batch, options.seed);
  AlignedBuffer<float> x(static_cast<std::size_t>(batch * d));
  AlignedBuffer<float> y(static_cast<std::size_t>(batch * d));
  std::vector<float> weight(static_cast<std::size_t>(batch));
  for (std::int64_t step = 0; step < steps; ++step) {
    monitor.check();
    const std::span<const std::int32_t> rows = order.next();
    parallel(ctx, batch, [&](std::int64_t i) {
      const std::int64_t row = rows[static_cast<std::size_t>(i)];
      std::copy_n(sample.x.row(row), d, x.data() + i * d);
      std::copy_n(sample.y.row(row), d, y.data() + i * d);
      weight[static_cast<std::size_t>(i)] = sample.weight[static_cast<std::size_t>(row)];
    });
    student_gradients(ctx, student, {x.data(), batch, d}, {y.data(), batch, d}, weight, scales,
                      options.auxiliary, gradients);
    const double schedule = distill_schedule(step, steps);
    for (AdamTensor& tensor : adam) tensor.step(ctx, schedule);
    monitor.advance(step + 1, fmt::format("error {:.4f}", gradients.output_loss));
  }
}

}  // namespace moesaic::converter
