#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "converter/self_routed/shrink_path.h"
#include "converter/stream.h"
#include "engine/monitor.h"

namespace moesaic::converter {

/// What a layer costs the model as its share of the budget falls.
struct LayerCurve {
  std::vector<PathPoint> path;
  struct Measured {
    double fraction = 1;
    double kl = 0;  // mean KL from the dense model, nats, with this layer alone converted
  };
  std::vector<Measured> measured;  // by falling fraction

  /// KL at a point of the path: its output error times KL per error, which is taken from the
  /// measured points, linear in the logarithm between them and constant beyond.
  double predicted_kl(const PathPoint& point) const;
};

/// The curves of all layers: each layer's path on `fit` windows of the calibration text, then the
/// KL divergence on others with points of that path in the layer's place (DESIGN.md section 2, step
/// 6). `tokens` [n_windows · n_ctx]: the last third judges, one window at
/// least and 4,096 tokens at most. Up to 1,024 tokens fit a path. Throws as ThresholdFit and
/// mean_divergence, Interrupted.
std::vector<LayerCurve> measure_curves(Passes& passes, std::span<const std::int32_t> tokens,
                                       std::int64_t n_ctx, engine::Monitor& monitor);

/// The point of each path that together have the smallest sum of predicted KL at a mean active
/// fraction of at most `active`: every curve is cut down to its lower convex hull, and the hulls'
/// segments are taken in order of KL saved per fraction spent. Throws InputError if even the ends
/// of all paths cost more.
std::vector<PathPoint> allot(std::span<const LayerCurve> curves, double active);

/// The same fraction for each layer: the point of its path that comes closest from below.
std::vector<PathPoint> allot_uniformly(std::span<const LayerCurve> curves, double active);

}  // namespace moesaic::converter
