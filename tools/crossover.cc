#include "tools/crossover.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <variant>

#include "engine/throughput.h"
#include "kernels/base/error.h"
#include "tools/statistics.h"

namespace moesaic::tools {
namespace {

constexpr int kDefaultFractions = 6;

std::vector<double> paired_ratios(const CrossoverPoint& point) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < point.dense_tps.size(); ++i) {
    ratios.push_back(point.hybrid_tps[i] / point.dense_tps[i]);
  }
  return ratios;
}

/// fn(n_active, n_experts) where the layer has experts behind a router.
template <class Layer, class Fn>
void with_router(Layer& layer, Fn&& fn) {
  if (auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp)) {
    fn(moe->n_active, moe->n_experts());
  } else if (auto* mixture = std::get_if<kernels::MixtureView>(&layer.mlp)) {
    fn(mixture->n_active, mixture->n_experts());
  }
}

/// The hybrid with every layer's number of active neurons times `factor`, at most all of them. A
/// layer that the converter gave none takes part as if it had one.
std::shared_ptr<const models::Checkpoint> scaled(const models::Checkpoint& hybrid, double factor) {
  auto copy = std::make_shared<models::Checkpoint>(hybrid);
  for (models::LayerWeights& layer : copy->layers) {
    with_router(layer, [&](std::int64_t& n_active, std::int64_t n_experts) {
      const auto own = static_cast<double>(std::max<std::int64_t>(n_active, 1));
      n_active = static_cast<std::int64_t>(
          std::llround(std::min(factor * own, static_cast<double>(n_experts))));
    });
  }
  return copy;
}

/// The factor from which on every layer runs all of its experts.
double largest_factor(const models::Checkpoint& hybrid) {
  double factor = 0;
  for (const models::LayerWeights& layer : hybrid.layers) {
    with_router(layer, [&](std::int64_t n_active, std::int64_t n_experts) {
      factor = std::max(factor, static_cast<double>(n_experts) /
                                    static_cast<double>(std::max<std::int64_t>(n_active, 1)));
    });
  }
  return factor;
}

void check_pair(const models::Transformer& dense, const models::Transformer& hybrid) {
  const auto path = [](const models::Transformer& model) {
    return model.checkpoint().file->path().string();
  };
  require<InputError>(
      largest_factor(hybrid.checkpoint()) > 0,
      "{}: no layer behind a router, expected a hybrid of `convert --recipe low-rank`",
      path(hybrid));
  require<InputError>(largest_factor(dense.checkpoint()) == 0,
                      "{}: a hybrid, expected the dense model", path(dense));
  const models::ModelConfig& a = dense.config();
  const models::ModelConfig& b = hybrid.config();
  require<InputError>(
      a.n_layers == b.n_layers && a.d_model == b.d_model && a.vocab_size == b.vocab_size,
      "{}: {} layers, d_model {}, {} tokens, expected {}, {}, {} as in {}", path(hybrid),
      b.n_layers, b.d_model, b.vocab_size, a.n_layers, a.d_model, a.vocab_size, path(dense));
}

}  // namespace

double CrossoverPoint::ratio() const { return median(paired_ratios(*this)); }

double CrossoverPoint::lowest() const {
  const std::vector<double> ratios = paired_ratios(*this);
  return *std::min_element(ratios.begin(), ratios.end());
}

double CrossoverPoint::highest() const {
  const std::vector<double> ratios = paired_ratios(*this);
  return *std::max_element(ratios.begin(), ratios.end());
}

std::optional<double> Crossover::break_even(std::size_t batch) const {
  const std::vector<CrossoverPoint>& row = points[batch];
  if (row.back().ratio() >= 1) return std::nullopt;
  for (std::size_t f = row.size() - 1; f > 0; --f) {
    const double left = row[f - 1].ratio();
    const double right = row[f].ratio();
    if (left < 1) continue;
    return fractions[f - 1] + (left - 1) / (left - right) * (fractions[f] - fractions[f - 1]);
  }
  return 0;
}

std::shared_ptr<const models::Checkpoint> with_active_fraction(const models::Checkpoint& hybrid,
                                                               double fraction) {
  double low = 0;
  double high = largest_factor(hybrid);
  // The fraction grows with the factor, in steps of single neurons.
  for (int i = 0; i < 50; ++i) {
    const double middle = (low + high) / 2;
    (scaled(hybrid, middle)->active_fraction() < fraction ? low : high) = middle;
  }
  const auto below = scaled(hybrid, low);
  const auto above = scaled(hybrid, high);
  return fraction - below->active_fraction() < above->active_fraction() - fraction ? below : above;
}

Crossover measure_crossover(models::Transformer& dense, models::Transformer& hybrid,
                            const CrossoverSettings& settings, engine::Monitor& monitor) {
  check_pair(dense, hybrid);
  require<InputError>(settings.repetitions >= 1, "{} repetitions given, expected >= 1",
                      settings.repetitions);
  Crossover result;
  result.settings = settings;

  std::vector<double> wanted = settings.fractions;
  if (wanted.empty()) {
    const double least = with_active_fraction(hybrid.checkpoint(), 0)->active_fraction();
    const double most =
        scaled(hybrid.checkpoint(), largest_factor(hybrid.checkpoint()))->active_fraction();
    for (int i = 0; i < kDefaultFractions; ++i) {
      wanted.push_back(least + (most - least) * i / (kDefaultFractions - 1));
    }
  }
  std::sort(wanted.begin(), wanted.end());
  std::vector<std::shared_ptr<const models::Checkpoint>> variants;
  for (const double fraction : wanted) {
    auto variant = with_active_fraction(hybrid.checkpoint(), fraction);
    const double reached = variant->active_fraction();
    if (!variants.empty() && reached <= result.fractions.back()) continue;
    result.fractions.push_back(reached);
    variants.push_back(std::move(variant));
  }

  monitor.stage("crossover", static_cast<std::int64_t>(settings.batches.size() * variants.size()));
  std::int64_t done = 0;
  for (const std::int64_t batch : settings.batches) {
    engine::Work work;
    work.n_gen = settings.n_gen;
    work.n_sequences = batch;
    work.depth = settings.depth;
    engine::TimedWork timed_dense(dense, work, monitor);
    std::vector<CrossoverPoint>& row = result.points.emplace_back();
    for (std::size_t f = 0; f < variants.size(); ++f) {
      models::Transformer variant(variants[f], hybrid.context());
      engine::TimedWork timed_hybrid(variant, work, monitor);
      CrossoverPoint& point = row.emplace_back();
      for (int r = 0; r < settings.repetitions; ++r) {
        for (int i = 0; i < 2; ++i) {
          const bool is_dense = (i + r) % 2 == 0;
          const double seconds = (is_dense ? timed_dense : timed_hybrid).run(monitor);
          (is_dense ? point.dense_tps : point.hybrid_tps)
              .push_back(static_cast<double>(work.n_tokens()) / seconds);
        }
      }
      monitor.advance(++done, fmt::format("batch {}, active fraction {:.2f}: {:.2f} times dense",
                                          batch, result.fractions[f], point.ratio()));
    }
  }
  return result;
}

}  // namespace moesaic::tools
