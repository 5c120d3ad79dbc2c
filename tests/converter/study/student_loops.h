#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "converter/study/paper_student.h"

namespace moesaic::converter::study {

/// The papers' student as its equation reads, in double: the oracle of the passes.
struct DoubleStudent {
  StudentShape shape;
  std::vector<std::vector<double>> tensors;  // in the order of PaperStudent::tensors()

  explicit DoubleStudent(PaperStudent& s) : shape(s.shape) {
    for (const auto& t : s.tensors()) tensors.emplace_back(t.begin(), t.end());
  }

  static double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
  }

  static double dot(const std::vector<double>& m, std::int64_t row, std::span<const double> x) {
    double sum = 0;
    for (std::size_t j = 0; j < x.size(); ++j)
      sum += m[static_cast<std::size_t>(row) * x.size() + j] * x[j];
    return sum;
  }

  // One per expert, whatever the router.
  std::vector<double> scores(std::span<const double> x) const {
    std::vector<double> z;
    const std::int64_t n_z = (shape.product_keys() ? 2 : 1) * shape.router_rank;
    for (std::int64_t r = 0; r < n_z; ++r) z.push_back(dot(tensors[6], r, x));
    if (shape.router_rank == 0) z.assign(x.begin(), x.end());
    std::vector<double> s;
    if (!shape.product_keys()) {
      for (std::int64_t i = 0; i < shape.n_experts; ++i) {
        s.push_back(dot(tensors[7], i, z) + tensors[8][static_cast<std::size_t>(i)]);
      }
      return s;
    }
    std::int64_t m = 0;
    while (m * m < shape.n_experts) ++m;
    const auto r = static_cast<std::size_t>(shape.router_rank);
    const auto key = [&](std::int64_t row, std::size_t first) {
      return dot(tensors[7], row, std::span(z).subspan(first, r)) +
             tensors[8][static_cast<std::size_t>(row)];
    };
    for (std::int64_t i = 0; i < shape.n_experts; ++i)
      s.push_back(key(i / m, 0) + key(m + i % m, r));
    return s;
  }

  std::vector<std::int64_t> selected(std::span<const double> x) const {
    const std::vector<double> s = scores(x);
    std::vector<std::int64_t> order(s.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return s[static_cast<std::size_t>(a)] > s[static_cast<std::size_t>(b)];
    });
    order.resize(static_cast<std::size_t>(shape.n_active));
    return order;
  }

  std::vector<double> output(std::span<const double> x) const {
    std::vector<double> y = tensors[9];
    const auto add = [&](std::size_t in, std::int64_t i, double gate) {
      const double h =
          shape.family == Family::Sgatlin
              ? dot(tensors[in], i, x)
              : gelu(dot(tensors[in], i, x) + tensors[in + 2][static_cast<std::size_t>(i)]);
      for (std::size_t j = 0; j < y.size(); ++j) {
        y[j] += gate * h * tensors[in + 1][static_cast<std::size_t>(i) * y.size() + j];
      }
    };
    for (std::int64_t i = 0; i < shape.n_shared; ++i) add(0, i, 1);
    if (shape.n_active == 0) return y;
    const std::vector<double> s = scores(x);
    const std::vector<std::int64_t> ids = selected(x);
    double total = 0;
    for (const std::int64_t i : ids) total += std::exp(s[static_cast<std::size_t>(i)]);
    for (const std::int64_t i : ids) {
      const double score = s[static_cast<std::size_t>(i)];
      add(3, i, shape.family == Family::Sgatlin ? score : std::exp(score) / total);
    }
    return y;
  }

  double loss(ConstMatrix x, ConstMatrix y) const {
    double sum = 0;
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const std::vector<double> xt(x.row(t), x.row(t) + x.cols);
      const std::vector<double> out = output(xt);
      for (std::int64_t j = 0; j < y.cols; ++j) {
        const double gap = out[static_cast<std::size_t>(j)] - y.row(t)[j];
        sum += gap * gap;
      }
    }
    return sum / static_cast<double>(y.rows * y.cols);
  }
};

/// A context, and normal deviates. Trainings of many small steps take one thread: on a busy machine
/// two wait for each other most of the time.
struct StudyCase {
  explicit StudyCase(int n_threads = 2) : pool(n_threads) {}

  ThreadPool pool;
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::F32};
  std::mt19937_64 rng{5};

  void fill(std::span<float> values, float scale = 1) {
    std::normal_distribution<float> normal;
    for (float& v : values) v = scale * normal(rng);
  }
};

}  // namespace moesaic::converter::study
