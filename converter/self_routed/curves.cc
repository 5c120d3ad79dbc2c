#include "converter/self_routed/curves.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "converter/divergence.h"
#include "converter/sensitivity.h"
#include "converter/stream.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kPathTokens = 1024;   // that fit a path
constexpr std::int64_t kJudgeTokens = 4096;  // that KL is measured on
constexpr double kLeast = 0.1;               // active fraction where paths end
// Where KL is measured.
constexpr std::array kMeasured = {0.6, 0.42, 0.26};

// Lower convex hull of (fraction, predicted KL), by rising fraction.
std::vector<std::size_t> hull(const LayerCurve& curve, std::span<const double> kl) {
  std::vector<std::size_t> kept;
  const auto& p = curve.path;
  for (std::size_t n = p.size(); n-- > 0;) {                // by rising fraction
    const auto above = [&](std::size_t a, std::size_t b) {  // b lies on or above the line a – n
      const double slope_an = (kl[n] - kl[a]) / (p[n].fraction - p[a].fraction);
      return kl[b] >= kl[a] + slope_an * (p[b].fraction - p[a].fraction);
    };
    while (kept.size() >= 2 && above(kept[kept.size() - 2], kept.back())) kept.pop_back();
    // What costs more and gains nothing is no corner.
    if (kept.size() == 1 && kl[kept[0]] <= kl[n]) continue;
    kept.push_back(n);
  }
  return kept;
}

}  // namespace

double LayerCurve::predicted_kl(const PathPoint& point) const {
  if (point.error <= 0 || measured.empty()) return 0;
  // ln(KL / error) at the measured fractions.
  std::vector<std::pair<double, double>> rates;
  for (const Measured& m : measured) {
    const PathPoint& p = nearest(path, m.fraction);
    if (p.error > 0 && m.kl > 0) rates.emplace_back(m.fraction, std::log(m.kl / p.error));
  }
  if (rates.empty()) return 0;
  double rate = rates.front().second;
  for (std::size_t i = 0; i < rates.size(); ++i) {
    if (point.fraction > rates[i].first) break;
    rate = rates[i].second;
    if (i + 1 < rates.size() && point.fraction > rates[i + 1].first) {
      const double share =
          (rates[i].first - point.fraction) / (rates[i].first - rates[i + 1].first);
      rate += share * (rates[i + 1].second - rates[i].second);
      break;
    }
  }
  return point.error * std::exp(rate);
}

std::vector<LayerCurve> measure_curves(Passes& passes, std::span<const std::int32_t> tokens,
                                       std::int64_t n_ctx, engine::Monitor& monitor) {
  models::Transformer& model = passes.model();
  Context& ctx = model.context();
  const models::Checkpoint& checkpoint = model.checkpoint();
  const int n_layers = model.config().n_layers;
  const std::int64_t d = model.config().d_model;
  const auto n_windows = static_cast<std::int64_t>(tokens.size()) / n_ctx;
  const std::int64_t n_judge =
      std::clamp<std::int64_t>(n_windows / 3, 1, std::max<std::int64_t>(1, kJudgeTokens / n_ctx));
  const auto fit_tokens = tokens.first(static_cast<std::size_t>((n_windows - n_judge) * n_ctx));
  const auto judge_tokens = tokens.subspan(fit_tokens.size());

  const std::unique_ptr<Stream> fit = passes.stream(fit_tokens, n_ctx);
  Substitution judge(passes, judge_tokens, n_ctx);
  const std::int64_t n_path = std::min(kPathTokens, fit->n_tokens());
  AlignedBuffer<float> r(static_cast<std::size_t>(n_path * d)), x(r.size()), y(r.size());
  const Matrix mr(r.data(), n_path, d), mx(x.data(), n_path, d), my(y.data(), n_path, d);
  std::vector<LayerCurve> curves;
  for (int l = 0; l < n_layers; ++l) {
    monitor.check();
    const auto& mlp = std::get<models::DenseMlp>(passes.own_mlp(l));
    fit->attention(l);
    fit->mlp_rows(l, {mr, mx, my});
    const std::vector<float> weight = token_weights(model, l, mr, my);
    const LayerSample sample{mx, my, weight, mx.rows};
    const Neurons teacher =
        unpack(mlp, fmt::format("{}: blk.{}", checkpoint.file->path().string(), l));
    ThresholdFit thresholds(ctx, teacher, sample, ThresholdShape::ByWeights);
    LayerCurve curve;
    curve.path = shrink_path(thresholds, false, kLeast);
    judge.attention(l);
    for (const double fraction : kMeasured) {
      monitor.check();
      const PathPoint& point = nearest(curve.path, fraction);
      const models::Mlp converted = thresholds.fit(point.shares).view(mlp);
      curve.measured.push_back(
          {point.fraction, judge.divergence(l, [&](Stream& other) { other.mlp(l, converted); })});
    }
    fit->mlp(l, mlp);
    judge.pass(l);
    const auto& half = curve.measured[1];
    monitor.advance(l + 1, fmt::format("KL {:.4f} at {:.2f}", half.kl, half.fraction));
    curves.push_back(std::move(curve));
  }
  return curves;
}

std::vector<PathPoint> allot(std::span<const LayerCurve> curves, double active) {
  struct Segment {
    std::size_t layer, to;  // index into its path
    double cost, gain;
  };
  std::vector<Segment> segments;
  std::vector<std::size_t> chosen;
  const auto n = static_cast<double>(curves.size());
  double spent = 0;
  for (std::size_t l = 0; l < curves.size(); ++l) {
    std::vector<double> kl;
    for (const PathPoint& p : curves[l].path) kl.push_back(curves[l].predicted_kl(p));
    const std::vector<std::size_t> corners = hull(curves[l], kl);
    chosen.push_back(corners.front());
    spent += curves[l].path[corners.front()].fraction / n;
    for (std::size_t i = 1; i < corners.size(); ++i) {
      const std::size_t from = corners[i - 1], to = corners[i];
      segments.push_back({l, to, (curves[l].path[to].fraction - curves[l].path[from].fraction) / n,
                          kl[from] - kl[to]});
    }
  }
  require<InputError>(spent <= active + 1e-9,
                      "--active: {:.3f} given, the least that can be planned is {:.3f}", active,
                      spent);
  // Within a layer the hull's slopes fall, so that its segments come in order.
  std::stable_sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) {
    return a.gain * b.cost > b.gain * a.cost;
  });
  std::vector<bool> stopped(curves.size());
  for (const Segment& s : segments) {
    if (stopped[s.layer]) continue;
    if (spent + s.cost > active + 1e-9) {
      stopped[s.layer] = true;
      continue;
    }
    spent += s.cost;
    chosen[s.layer] = s.to;
  }
  std::vector<PathPoint> points;
  for (std::size_t l = 0; l < curves.size(); ++l) points.push_back(curves[l].path[chosen[l]]);
  return points;
}

std::vector<PathPoint> allot_uniformly(std::span<const LayerCurve> curves, double active) {
  std::vector<PathPoint> points;
  for (const LayerCurve& curve : curves) {
    const auto point = std::find_if(curve.path.begin(), curve.path.end(), [&](const PathPoint& p) {
      return p.fraction <= active + 1e-9;
    });
    require<InputError>(point != curve.path.end(),
                        "--active: {:.3f} given, the least that can be planned is {:.3f}", active,
                        curve.path.back().fraction);
    points.push_back(*point);
  }
  return points;
}

}  // namespace moesaic::converter
