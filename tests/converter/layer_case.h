#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "converter/fit.h"
#include "converter/student.h"
#include "kernels/base/context.h"

namespace moesaic::converter {

/// A small random MLP with inputs, outputs and weights, for the converter's tests.
struct LayerCase {
  ThreadPool pool{2};
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::F32};
  Neurons teacher;
  AlignedBuffer<float> x, y;
  std::vector<float> weight;
  LayerSample sample;

  LayerCase(std::int64_t n_tokens, std::int64_t d_model, std::int64_t n_neurons,
            kernels::Activation phi, std::uint64_t seed = 1) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](AlignedBuffer<float>& b, std::int64_t n, float scale) {
      b = AlignedBuffer<float>(static_cast<std::size_t>(n));
      for (float& v : b) v = scale * normal(rng);
    };
    const float unit = 1 / std::sqrt(static_cast<float>(d_model));
    teacher.phi = phi;
    teacher.d_model = d_model;
    teacher.n = n_neurons;
    fill(teacher.w_gate, n_neurons * d_model, 2 * unit);
    fill(teacher.w_up, n_neurons * d_model, unit);
    fill(teacher.w_down, n_neurons * d_model, unit);
    fill(x, n_tokens * d_model, 1);
    y = AlignedBuffer<float>(x.size());
    for (std::int64_t t = 0; t < n_tokens; ++t) {
      weight.push_back(0.5F + static_cast<float>(t % 5) / 4);
      teacher_output(x.data() + t * d_model, y.data() + t * d_model);
    }
    sample = {
        {x.data(), n_tokens, d_model}, {y.data(), n_tokens, d_model}, weight, n_tokens * 3 / 4};
  }

  void teacher_output(const float* xt, float* yt) const {
    const auto d = static_cast<std::size_t>(teacher.d_model);
    std::vector<double> sum(d);
    for (std::int64_t i = 0; i < teacher.n; ++i) {
      const double h = activation(teacher, i, xt);
      for (std::size_t j = 0; j < d; ++j)
        sum[j] += h * teacher.w_down[static_cast<std::size_t>(i) * d + j];
    }
    for (std::size_t j = 0; j < d; ++j) yt[j] = static_cast<float>(sum[j]);
  }

  static double activation(const Neurons& n, std::int64_t i, const float* xt) {
    double g = 0;
    double u = 0;
    for (std::int64_t j = 0; j < n.d_model; ++j) {
      g += static_cast<double>(n.gate().row(i)[j]) * xt[j];
      u += static_cast<double>(n.up().row(i)[j]) * xt[j];
    }
    return static_cast<double>(kernels::activate(n.phi, static_cast<float>(g))) * u;
  }
};

}  // namespace moesaic::converter
