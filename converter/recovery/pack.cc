#include "converter/recovery/pack.h"

#include <algorithm>

#include "converter/linalg.h"
#include "converter/recovery/moments.h"
#include "converter/rounding.h"
#include "converter/student.h"
#include "engine/monitor.h"
#include "kernels/linear.h"

namespace moesaic::converter {
namespace {

// Second moments of a layer's inputs and features.
struct Moments {
  AlignedBuffer<float> xx, ff;
};

template <class T>
AlignedBuffer<T> copy(const AlignedBuffer<T>& from) {
  AlignedBuffer<T> to(from.size());
  std::copy(from.begin(), from.end(), to.begin());
  return to;
}

Student to_student(const MoeLayer<Bfloat16>& layer) {
  const MoeShape& s = layer.shape();
  const MoeParameters<float>& p = layer.parameters();
  Student out;
  out.plan = {.dense = false,
              .n_shared = s.n_shared,
              .n_active = s.n_active,
              .router_rank = s.router_rank,
              .bypass_rank = s.bypass_rank};
  out.neurons.phi = s.phi;
  out.neurons.d_model = s.d_model;
  out.neurons.n = s.n_neurons();
  out.neurons.w_gate = copy(p.w_gate);
  out.neurons.w_up = copy(p.w_up);
  out.neurons.w_down = copy(p.w_down);
  out.mean = AlignedBuffer<float>(layer.mean().size());
  std::copy(layer.mean().begin(), layer.mean().end(), out.mean.begin());
  out.router_v = copy(p.router_v);
  out.router_u = copy(p.router_u);
  out.router_bias = copy(p.router_bias);
  out.bypass_q = copy(p.bypass_q);
  out.bypass_p = copy(p.bypass_p);
  out.bias = copy(p.bias);
  return out;
}

// Lower Cholesky factor of the moments; what was never seen (an expert that no token selected) is
// held by a hundredth of the mean diagonal.
DMatrix factor(const AlignedBuffer<float>& moments, std::int64_t n) {
  DMatrix sum(n, n);
  std::copy(moments.begin(), moments.end(), sum.data.begin());
  double trace = 0;
  for (std::int64_t i = 0; i < n; ++i) trace += sum.at(i, i);
  for (std::int64_t i = 0; i < n; ++i) {
    sum.at(i, i) += 0.01 * trace / static_cast<double>(n) + 1e-30;
  }
  return cholesky(std::move(sum));
}

}  // namespace

std::vector<std::pair<int, models::PackedSecretMoe>> pack_trained(Context& ctx, Trainer& trainer,
                                                                  const models::Checkpoint& hybrid,
                                                                  std::int64_t n_windows,
                                                                  engine::Monitor& monitor) {
  Hybrid<Bfloat16>& model = trainer.model();
  n_windows = std::min(n_windows, trainer.n_train_windows());
  std::vector<Moments> moments;
  for (const auto& c : model.converted()) {
    const auto n = static_cast<std::size_t>(c.moe.shape().n_neurons());
    const auto d = static_cast<std::size_t>(c.moe.shape().d_model);
    moments.push_back({AlignedBuffer<float>(d * d), AlignedBuffer<float>(n * n)});
  }
  model.observe_features([&](std::size_t index, MatrixView<const std::uint16_t> x,
                             MatrixView<const std::uint16_t> f, std::span<const float> weight) {
    const Workspace::Scope scope(ctx.workspace);
    const auto xw = take_weighted(ctx, x, weight, false);
    const auto fw = take_weighted(ctx, f, weight, false);
    kernels::gemm(ctx, true, false, 1, xw, xw, 1, {moments[index].xx.data(), x.cols, x.cols});
    kernels::gemm(ctx, true, false, 1, fw, fw, 1, {moments[index].ff.data(), f.cols, f.cols});
  });
  monitor.stage("round what was trained",
                n_windows + static_cast<std::int64_t>(model.converted().size()));
  std::int64_t done = 0;
  for (std::int64_t w = 0; w < n_windows; ++w) {
    monitor.check();
    const Workspace::Scope scope(ctx.workspace);
    // Spread over the text.
    const auto ids = trainer.window(w * trainer.n_train_windows() / n_windows);
    model.forward(ids, take_matrix<std::uint16_t>(ctx, static_cast<std::int64_t>(ids.size()),
                                                  model.head().cols));
    monitor.advance(++done, "");
  }
  model.observe_features({});

  std::vector<std::pair<int, models::PackedSecretMoe>> packed;
  for (std::size_t i = 0; i < model.converted().size(); ++i) {
    monitor.check();
    const auto& c = model.converted()[i];
    const auto& view =
        std::get<kernels::SecretMoeView>(hybrid.layers[static_cast<std::size_t>(c.layer)].mlp);
    Student student = to_student(c.moe);
    const MoeShape& s = c.moe.shape();
    round_inputs_to(ctx, student, factor(moments[i].xx, s.d_model), view.experts.dtype,
                    view.router_v.dtype);
    round_outputs(ctx, {student.neurons.w_down.data(), s.n_neurons(), s.d_model},
                  factor(moments[i].ff, s.n_neurons()), view.experts.dtype);
    packed.emplace_back(c.layer, pack(student, view.experts.dtype, view.router_v.dtype));
    monitor.advance(++done, "");
  }
  return packed;
}

}  // namespace moesaic::converter
