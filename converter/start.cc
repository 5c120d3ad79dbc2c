#include "converter/start.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>

#include "converter/blocks.h"
#include "converter/linalg.h"
#include "converter/rows.h"
#include "converter/tiles.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"

namespace moesaic::converter {
namespace {

// Fits of the router with tokens going to the clone of the largest score before.
constexpr int kSharingRounds = 2;

// What the selection and the router are fitted to: per neuron the weighted mean, and E[ω c²].
struct NeuronMoments {
  std::vector<double> mean;        // μ
  std::vector<double> importance;  // E[ω (h − μ)²] ‖w_down‖²
  std::vector<double> norm;        // ‖w_down‖
};

NeuronMoments neuron_moments(Context& ctx, const Neurons& teacher, const LayerSample& s) {
  const auto n = static_cast<std::size_t>(teacher.n);
  NeuronMoments m{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n)};
  std::vector<double> square(n);
  double total = 0;
  for_tiles(ctx, std::min(kRouterRows, s.n_fit), [&](std::int64_t first, std::int64_t rows) {
    Matrix h = take(ctx, rows, teacher.n);
    neuron_activations(ctx, teacher, s.x.slice(first, rows), h, take(ctx, rows, teacher.n));
    const float* w = s.weight.data() + first;
    add_columns(ctx, h, w, m.mean, [](float v, std::int64_t) { return static_cast<double>(v); });
    add_columns(ctx, h, w, square,
                [](float v, std::int64_t) { return static_cast<double>(v) * v; });
    total = std::accumulate(w, w + rows, total);
  });
  for (std::size_t i = 0; i < n; ++i) {
    const float* down = teacher.down().row(static_cast<std::int64_t>(i));
    m.norm[i] = std::sqrt(std::inner_product(down, down + teacher.d_model, down, 0.0));
    m.mean[i] /= total;
    m.importance[i] =
        std::max(0.0, square[i] / total - m.mean[i] * m.mean[i]) * m.norm[i] * m.norm[i];
  }
  return m;
}

AlignedBuffer<float> gather_rows(ConstMatrix src, std::span<const std::int32_t> rows) {
  AlignedBuffer<float> out(rows.size() * static_cast<std::size_t>(src.cols));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(src.row(rows[i]), src.cols, out.data() + static_cast<std::int64_t>(i) * src.cols);
  }
  return out;
}

// Rows of x about their weighted mean, times √ω.
struct Centred {
  std::vector<double> mean;
  double total = 0;  // Σ ω

  Centred(Context& ctx, const LayerSample& s, std::int64_t n_rows)
      : mean(static_cast<std::size_t>(s.x.cols)) {
    total = std::accumulate(s.weight.begin(), s.weight.begin() + n_rows, 0.0);
    add_columns(ctx, s.x.slice(0, n_rows), s.weight.data(), mean,
                [](float v, std::int64_t) { return static_cast<double>(v); });
    for (double& m : mean) m /= total;
  }
};

// What is changed of the contributions c [rows, n_experts] of a tile before the router is fitted to
// them.   x [rows, d_model], h [rows, neurons]
using Share = std::function<void(ConstMatrix x, ConstMatrix h, Matrix c)>;

// Weighted reduced-rank regression of c on x, both about their weighted means.
void fit_router(Context& ctx, Student& out, const LayerSample& s, double ridge,
                const Share& share) {
  const std::int64_t d = out.neurons.d_model;
  const std::int64_t n_experts = out.n_experts();
  const std::int64_t rank = out.plan.router_rank;
  const auto ud = static_cast<std::size_t>(d);
  const auto ue = static_cast<std::size_t>(n_experts);
  AlignedBuffer<float> xx(ud * ud);
  AlignedBuffer<float> xc(ud * ue);
  std::vector<double> c_mean(ue);
  const std::int64_t n_rows = std::min(kRouterRows, s.n_fit);
  const Centred about(ctx, s, n_rows);
  const std::vector<float> norm = down_norms(out.neurons);
  // Centred before they are multiplied: an input whose mean is large would else leave a difference
  // of large numbers, rounded, that is no covariance.
  for_tiles(ctx, n_rows, [&](std::int64_t first, std::int64_t rows) {
    Matrix h = take(ctx, rows, out.neurons.n);
    Matrix c = take(ctx, rows, n_experts);
    Matrix xw = take(ctx, rows, d);
    const ConstMatrix x = s.x.slice(first, rows);
    const float* w = s.weight.data() + first;
    neuron_activations(ctx, out.neurons, x, h, take(ctx, rows, out.neurons.n));
    for_each_row(ctx, rows,
                 [&](std::int64_t t, int) { contributions(out, norm, h.row(t), c.row(t)); });
    if (share) share(x, h, c);
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      const float root = std::sqrt(w[t]);
      for (std::int64_t e = 0; e < n_experts; ++e) c.row(t)[e] *= root;
      for (std::int64_t i = 0; i < d; ++i) {
        xw.row(t)[i] =
            root * (x.row(t)[i] - static_cast<float>(about.mean[static_cast<std::size_t>(i)]));
      }
    });
    kernels::gemm(ctx, true, false, 1, xw, xw, 1, {xx.data(), d, d});
    kernels::gemm(ctx, true, false, 1, xw, c, 1, {xc.data(), d, n_experts});
    // √ω was multiplied in once already: the sums of ω c need it once more.
    auto root = take(ctx, rows);
    std::transform(w, w + rows, root.begin(), [](float v) { return std::sqrt(v); });
    add_columns(ctx, c, root.data(), c_mean,
                [](float v, std::int64_t) { return static_cast<double>(v); });
  });
  DMatrix dxx = to_double({xx.data(), d, d});
  DMatrix dxc = to_double({xc.data(), d, n_experts});
  // Inputs are known to float32's precision: where they do not vary beyond it, there is nothing to
  // regress on.
  const double floor =
      1e-6 * about.total *
      std::inner_product(about.mean.begin(), about.mean.end(), about.mean.begin(), 0.0);
  for (std::int64_t i = 0; i < d; ++i) dxx.at(i, i) += floor / static_cast<double>(d);
  for (double& m : c_mean) m /= about.total;
  const LowRank router = reduced_rank_regression(std::move(dxx), std::move(dxc), rank, ridge);
  out.router_v = to_float(router.v);
  out.router_u = to_float(router.u);
  out.router_bias = AlignedBuffer<float>(ue);
  std::vector<double> vx(static_cast<std::size_t>(rank));
  for (std::int64_t r = 0; r < rank; ++r) {
    vx[static_cast<std::size_t>(r)] = std::inner_product(
        about.mean.begin(), about.mean.end(), &router.v.data[static_cast<std::size_t>(r * d)], 0.0);
  }
  for (std::int64_t e = 0; e < n_experts; ++e) {
    const auto ue_e = static_cast<std::size_t>(e);
    out.router_bias[ue_e] = static_cast<float>(
        c_mean[ue_e] -
        std::inner_product(vx.begin(), vx.end(), router.u.data.begin() + e * rank, 0.0));
  }
}

// The neurons `order` of the teacher, grouped into blocks so that E[ω c_i c_j] is large within
// them: few blocks then hold most of a token's contributions. Blocks, and the neurons of each, in
// the order of their importance, in which `order` is already.
//
// SmolLM2-135M layer 14, blocks of 16 at .49, 8 thousand tokens, held-out error in closed form:
// .197; by correlations of c .202, by covariances .201, by E[ω c_i c_j] of c scaled alike .201.
void group_neurons(Context& ctx, const Neurons& teacher, const LayerSample& s,
                   const NeuronMoments& moments, std::int64_t block,
                   std::span<std::int32_t> order) {
  const auto n = static_cast<std::int64_t>(order.size());
  AlignedBuffer<float> products(order.size() * order.size());
  const Matrix affinity(products.data(), n, n);
  // In units of their root mean square over neurons, so that it does not matter how large they are.
  double square = 1e-30;
  for (const std::int32_t i : order) square += moments.importance[static_cast<std::size_t>(i)];
  const double unit = std::sqrt(square / static_cast<double>(n));
  double total = 0;
  for_tiles(ctx, std::min(kRouterRows, s.n_fit), [&](std::int64_t first, std::int64_t rows) {
    Matrix h = take(ctx, rows, teacher.n);
    Matrix c = take(ctx, rows, n);
    neuron_activations(ctx, teacher, s.x.slice(first, rows), h, take(ctx, rows, teacher.n));
    const float* w = s.weight.data() + first;
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      const double root = std::sqrt(w[t]);
      for (std::size_t i = 0; i < order.size(); ++i) {
        const auto neuron = static_cast<std::size_t>(order[i]);
        c.row(t)[i] = static_cast<float>(root * std::abs(h.row(t)[neuron] - moments.mean[neuron]) *
                                         moments.norm[neuron] / unit);
      }
    });
    kernels::gemm(ctx, true, false, 1, c, c, 1, affinity);
    total = std::accumulate(w, w + rows, total);
  });
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      const auto mean = static_cast<float>(affinity.row(i)[j] / total);
      affinity.row(i)[j] = affinity.row(j)[i] = mean;
    }
  }
  const std::vector<std::int32_t> grouped = balanced_groups(affinity, block);
  const std::vector<std::int32_t> before(order.begin(), order.end());
  std::vector<std::size_t> blocks(order.size() / static_cast<std::size_t>(block));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::vector<double> importance(blocks.size());
  for (std::size_t i = 0; i < grouped.size(); ++i) {
    importance[i / static_cast<std::size_t>(block)] +=
        moments.importance[static_cast<std::size_t>(before[static_cast<std::size_t>(grouped[i])])];
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [&](std::size_t a, std::size_t b) { return importance[a] > importance[b]; });
  for (std::size_t i = 0; i < order.size(); ++i) {
    const std::size_t from =
        blocks[i / static_cast<std::size_t>(block)] * static_cast<std::size_t>(block) +
        i % static_cast<std::size_t>(block);
    order[i] = before[static_cast<std::size_t>(grouped[from])];
  }
}

AlignedBuffer<float> appended(const AlignedBuffer<float>& values, std::span<const float> more) {
  AlignedBuffer<float> out(values.size() + more.size());
  std::copy(values.begin(), values.end(), out.begin());
  std::copy(more.begin(), more.end(), out.begin() + static_cast<std::ptrdiff_t>(values.size()));
  return out;
}

// Copies of the first experts behind the last one, round after round; the router is left behind.
void append_clones(Student& s, std::int64_t n_clones) {
  const std::int64_t n_experts = s.n_experts();
  const std::int64_t first = s.plan.n_shared;
  const std::int64_t d = s.neurons.d_model;
  s.families.resize(static_cast<std::size_t>(std::min(n_experts, n_clones)));
  for (std::size_t e = 0; e < s.families.size(); ++e) s.families[e] = {static_cast<int>(e)};
  for (std::int64_t done = 0; done < n_clones;) {
    const std::int64_t n = std::min(n_experts, n_clones - done);
    for (std::int64_t e = 0; e < n; ++e) {
      s.families[static_cast<std::size_t>(e)].push_back(static_cast<int>(n_experts + done + e));
    }
    const auto neurons = static_cast<std::size_t>(n * s.plan.block);
    for (AlignedBuffer<float>* rows : {&s.neurons.w_gate, &s.neurons.w_up, &s.neurons.w_down}) {
      *rows = appended(*rows, rows->span().subspan(static_cast<std::size_t>(first * d),
                                                   neurons * static_cast<std::size_t>(d)));
    }
    s.mean = appended(s.mean, s.mean.span().subspan(static_cast<std::size_t>(first), neurons));
    for (std::size_t i = 0; i < neurons; ++i) {
      s.origin.push_back(s.origin[static_cast<std::size_t>(first) + i]);
    }
    s.neurons.n += static_cast<std::int64_t>(neurons);
    done += n;
  }
}

// Which of n clones answers, of a token on these sides of hyperplanes: each clone takes what agrees
// with the binary digits of its number, and numbers there is no clone for lose their first digit.
std::size_t clone_of(std::size_t sides, std::size_t n) {
  while (sides >= n) sides ^= std::bit_floor(sides);
  return sides;
}

void start_clones(Context& ctx, Student& s, const LayerSample& sample, double ridge) {
  const std::int64_t d = s.neurons.d_model;
  const AlignedBuffer<float> v = std::move(s.router_v);
  append_clones(s, s.plan.n_clones);
  const auto n_digits = static_cast<std::int64_t>(std::bit_width(s.families[0].size() - 1));
  const std::int64_t n_planes = std::min(n_digits - 1, s.plan.router_rank);
  const Centred about(ctx, sample, std::min(kRouterRows, sample.n_fit));
  fit_router(ctx, s, sample, ridge, [&](ConstMatrix x, ConstMatrix h, Matrix c) {
    for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
      std::size_t sides = 0;
      for (std::int64_t p = 0; p < n_planes; ++p) {
        double at = 0;
        for (std::int64_t j = 0; j < d; ++j) {
          at += v[static_cast<std::size_t>(p * d + j)] *
                (x.row(t)[j] - about.mean[static_cast<std::size_t>(j)]);
        }
        if (at > 0) sides |= std::size_t{2} << p;
      }
      for (const std::vector<std::int32_t>& family : s.families) {
        const std::int64_t neuron = s.plan.n_shared + family[0] * s.plan.block;
        const bool above = h.row(t)[neuron] > s.mean[static_cast<std::size_t>(neuron)];
        const std::size_t own = clone_of(sides + (above ? 1 : 0), family.size());
        for (std::size_t i = 0; i < family.size(); ++i) {
          if (i != own) c.row(t)[family[i]] = 0;
        }
      }
    });
  });
  for (int round = 0; round < kSharingRounds; ++round) {
    const Student& before = s;  // fit_router replaces its router when all tiles are done
    fit_router(ctx, s, sample, ridge, [&](ConstMatrix x, ConstMatrix, Matrix c) {
      const Matrix scores = take(ctx, x.rows, before.n_experts());
      router_scores(ctx, before, x, scores);
      for_each_row(ctx, x.rows,
                   [&](std::int64_t t, int) { leave_to_winners(before, scores.row(t), c.row(t)); });
    });
  }
}

}  // namespace

Student start_from_neurons(Context& ctx, const Neurons& teacher, const LayerSample& s,
                           const LayerPlan& plan, double ridge) {
  const std::int64_t n_routed = teacher.n - plan.n_shared;
  require<InputError>(
      plan.n_shared >= 0 && n_routed >= 1 && plan.block >= 1 && n_routed % plan.block == 0 &&
          plan.n_clones >= 0 && plan.n_active >= 0 && plan.n_active <= n_experts(plan, teacher.n),
      "plan: {} shared neurons and {} selected experts of {}, {} cloned, do not fit {} neurons",
      plan.n_shared, plan.n_active, plan.block, plan.n_clones, teacher.n);
  const NeuronMoments moments = neuron_moments(ctx, teacher, s);

  Student out;
  out.plan = plan;
  out.origin.resize(static_cast<std::size_t>(teacher.n));
  std::iota(out.origin.begin(), out.origin.end(), 0);
  std::stable_sort(out.origin.begin(), out.origin.end(), [&](std::int32_t a, std::int32_t b) {
    return moments.importance[static_cast<std::size_t>(a)] >
           moments.importance[static_cast<std::size_t>(b)];
  });
  if (plan.block > 1) {
    group_neurons(ctx, teacher, s, moments, plan.block,
                  std::span(out.origin).subspan(static_cast<std::size_t>(plan.n_shared)));
  }
  out.neurons.phi = teacher.phi;
  out.neurons.d_model = teacher.d_model;
  out.neurons.n = teacher.n;
  out.neurons.w_gate = gather_rows(teacher.gate(), out.origin);
  out.neurons.w_up = gather_rows(teacher.up(), out.origin);
  out.neurons.w_down = gather_rows(teacher.down(), out.origin);
  out.mean = AlignedBuffer<float>(static_cast<std::size_t>(teacher.n));
  for (auto i = static_cast<std::size_t>(plan.n_shared); i < out.mean.size(); ++i) {
    out.mean[i] = static_cast<float>(moments.mean[static_cast<std::size_t>(out.origin[i])]);
  }
  fit_router(ctx, out, s, ridge, {});
  if (plan.n_clones > 0) start_clones(ctx, out, s, ridge);
  const auto d = static_cast<std::size_t>(teacher.d_model);
  out.bypass_q = AlignedBuffer<float>(static_cast<std::size_t>(plan.bypass_rank) * d);
  out.bypass_p = AlignedBuffer<float>(static_cast<std::size_t>(plan.bypass_rank) * d);
  out.bias = AlignedBuffer<float>(d);
  return out;
}

}  // namespace moesaic::converter
