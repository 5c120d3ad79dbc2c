#include "converter/study/train.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>

#include "converter/adam.h"

namespace moesaic::converter::study {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Trains in place; the mean loss of the last tenth, NaN where it stopped being finite.
double train_at(Context& ctx, PaperStudent& student, const LayerData& data,
                const TrainOptions& options, double rate, engine::Monitor& monitor) {
  const std::int64_t d = data.d_model;
  const std::int64_t batch = std::min(options.batch, data.n_fit);
  const std::int64_t steps = train_steps(options, data.n_fit);
  PaperStudent gradient(student.shape);
  std::vector<AdamTensor> tensors;
  const auto values = student.tensors();
  const auto gradients = gradient.tensors();
  for (std::size_t i = 0; i < values.size(); ++i) {
    tensors.emplace_back(values[i], gradients[i], rate, AdamUnit::One);
  }
  std::vector<std::int64_t> order(static_cast<std::size_t>(data.n_fit));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 rng(options.seed);
  AlignedBuffer<float> x(static_cast<std::size_t>(batch * d));
  AlignedBuffer<float> y(x.size());
  std::size_t next = order.size();
  const std::int64_t last = std::max<std::int64_t>(1, steps / 10);
  double sum = 0;
  for (std::int64_t step = 0; step < steps; ++step) {
    monitor.check();
    if (next + static_cast<std::size_t>(batch) > order.size()) {
      for (std::size_t i = order.size() - 1; i > 0; --i)
        std::swap(order[i], order[rng() % (i + 1)]);
      next = 0;
    }
    const int n_threads = ctx.pool.n_threads();
    ctx.pool.run([&](int thread) {
      const Range rows = split(batch, n_threads, thread);
      for (std::int64_t i = rows.begin; i < rows.end; ++i) {
        const std::int64_t row = order[next + static_cast<std::size_t>(i)];
        std::copy_n(data.inputs().row(row), d, x.data() + i * d);
        std::copy_n(data.outputs().row(row), d, y.data() + i * d);
      }
    });
    next += static_cast<std::size_t>(batch);
    const double loss =
        loss_and_gradient(ctx, student, {x.data(), batch, d}, {y.data(), batch, d}, gradient);
    if (!std::isfinite(loss)) return kNan;
    if (step >= steps - last) sum += loss;
    const double schedule = cosine_schedule(step, steps, 0);
    for (AdamTensor& tensor : tensors) tensor.step(ctx, schedule);
    monitor.advance(step + 1, fmt::format("loss {:.4f}", loss));
  }
  return sum / static_cast<double>(last);
}

}  // namespace

std::int64_t train_steps(const TrainOptions& options, std::int64_t n_fit) {
  const std::int64_t batch = std::min(options.batch, n_fit);
  return std::max<std::int64_t>(
      1, static_cast<std::int64_t>(options.passes * static_cast<double>(n_fit) /
                                   static_cast<double>(batch)));
}

Trained train(Context& ctx, const StudentShape& shape, const LayerData& data,
              const TrainOptions& options, std::string_view name, double from, double to,
              engine::Monitor& monitor) {
  const std::vector<double> mean = data.mean_output();
  Trained best{random_start(shape, mean, options.seed), kNan, {}};
  double least = std::numeric_limits<double>::infinity();
  const auto n_rates = static_cast<double>(options.rates.size());
  for (const double rate : options.rates) {
    const auto done = static_cast<double>(best.by_rate.size());
    monitor.job(from + (to - from) * done / n_rates, from + (to - from) * (done + 1) / n_rates);
    monitor.stage(fmt::format("{}, rate {:g}", name, rate), train_steps(options, data.n_fit));
    PaperStudent student = random_start(shape, mean, options.seed);
    RateResult result{rate, train_at(ctx, student, data, options, rate, monitor), kNan};
    if (std::isfinite(result.training_loss)) {
      result.chosen_by = judge(ctx, student, data, data.n_fit, data.n_choose).all;
    }
    if (result.chosen_by < least) {
      least = result.chosen_by;
      best.rate = rate;
      best.student = std::move(student);
    }
    best.by_rate.push_back(result);
  }
  return best;
}

Unexplained judge(Context& ctx, const PaperStudent& student, const LayerData& data,
                  std::int64_t first, std::int64_t n) {
  AlignedBuffer<float> y(static_cast<std::size_t>(n * data.d_model));
  const Matrix y_hat(y.data(), n, data.d_model);
  predict(ctx, student, data.inputs().slice(first, n), y_hat);
  return data.unexplained(first, y_hat);
}

}  // namespace moesaic::converter::study
