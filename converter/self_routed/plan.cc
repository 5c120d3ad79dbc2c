#include "converter/self_routed/plan.h"

#include <fmt/format.h>

#include <cerrno>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <system_error>

#include "models/self_routed_file.h"

namespace moesaic::converter {
namespace {

using Json = nlohmann::ordered_json;

double checked_share(const Json& layer, const char* key, const std::string& file) {
  const double share = layer.at(key);
  require<FormatError>(share >= 0 && share <= 1, "{}: layer {}: {} is {}, expected 0 to 1", file,
                       layer.at("layer").dump(), key, share);
  return share;
}

LayerCurve parse_curve(const Json& json, bool up_by_input) {
  LayerCurve curve;
  for (const Json& p : json.at("path")) {
    PathPoint point{{p.at(0), p.at(1), p.at(2)}, 1, p.at(3)};
    point.fraction = active_fraction(point.shares, up_by_input);
    curve.path.push_back(point);
  }
  for (const Json& m : json.at("measured")) curve.measured.push_back({m.at(0), m.at(1)});
  return curve;
}

}  // namespace

double RoutedPlan::active_fraction() const {
  const double sum = std::accumulate(layers.begin(), layers.end(), 0.0,
                                     [](double s, const Layer& l) { return s + l.fraction; });
  return layers.empty() ? 1 : sum / static_cast<double>(layers.size());
}

bool stays_dense(const RoutedPlan::Layer& layer) {
  return layer.shares.input >= 1 && layer.shares.gate >= 1 && layer.shares.hidden >= 1;
}

RoutedPlan make_plan(std::vector<LayerCurve> curves, double active, Budget budget) {
  RoutedPlan plan;
  const std::vector<PathPoint> points =
      budget == Budget::Planned ? allot(curves, active) : allot_uniformly(curves, active);
  for (std::size_t l = 0; l < points.size(); ++l) {
    plan.layers.push_back(
        {points[l].shares, points[l].fraction, curves[l].predicted_kl(points[l])});
  }
  plan.curves = std::move(curves);
  return plan;
}

RoutedPlan threshold_plan(int n_layers, double active) {
  RoutedPlan plan;
  plan.up_by_input = true;
  plan.layers.assign(static_cast<std::size_t>(n_layers), {{active, 1, active}, active, 0});
  return plan;
}

std::string plan_json(const RoutedPlan& plan) {
  Json j;
  j["moesaic_plan"] = 1;
  j["kind"] = plan.up_by_input ? models::kKindGluInput : models::kKindGluGate;
  j["active_fraction"] = plan.active_fraction();
  j["layers"] = Json::array();
  for (std::size_t l = 0; l < plan.layers.size(); ++l) {
    const RoutedPlan::Layer& layer = plan.layers[l];
    j["layers"].push_back({{"layer", l},
                           {"input_share", layer.shares.input},
                           {"gate_share", layer.shares.gate},
                           {"hidden_share", layer.shares.hidden},
                           {"active_fraction", layer.fraction},
                           {"predicted_kl", layer.predicted}});
  }
  j["curves"] = Json::array();
  for (const LayerCurve& curve : plan.curves) {
    Json path = Json::array(), measured = Json::array();
    for (const PathPoint& p : curve.path) {
      path.push_back({p.shares.input, p.shares.gate, p.shares.hidden, p.error});
    }
    for (const auto& m : curve.measured) measured.push_back({m.fraction, m.kl});
    j["curves"].push_back({{"path", std::move(path)}, {"measured", std::move(measured)}});
  }
  return j.dump(1) + "\n";
}

RoutedPlan parse_plan(const std::string& text, const std::string& file, int n_layers) {
  RoutedPlan plan;
  try {
    const Json j = Json::parse(text);
    const int version = j.at("moesaic_plan");
    require<FormatError>(version == 1, "{}: moesaic_plan is {}, expected 1", file, version);
    const std::string kind = j.at("kind");
    require<FormatError>(kind == models::kKindGluGate || kind == models::kKindGluInput,
                         "{}: kind is \"{}\", expected {} or {}", file, kind, models::kKindGluGate,
                         models::kKindGluInput);
    plan.up_by_input = kind == models::kKindGluInput;
    for (const Json& layer : j.at("layers")) {
      const int index = layer.at("layer");
      require<FormatError>(index == static_cast<int>(plan.layers.size()),
                           "{}: layer {} at place {}, expected them in order", file, index,
                           plan.layers.size());
      const Shares shares{checked_share(layer, "input_share", file),
                          plan.up_by_input ? 1 : checked_share(layer, "gate_share", file),
                          checked_share(layer, "hidden_share", file)};
      require<FormatError>(shares.hidden <= shares.gate,
                           "{}: layer {}: hidden_share {} above gate_share {}", file, index,
                           shares.hidden, shares.gate);
      plan.layers.push_back({shares, converter::active_fraction(shares, plan.up_by_input),
                             layer.value("predicted_kl", 0.0)});
    }
    if (j.contains("curves")) {
      for (const Json& curve : j.at("curves")) {
        plan.curves.push_back(parse_curve(curve, plan.up_by_input));
      }
    }
  } catch (const nlohmann::json::exception& e) {
    throw FormatError(fmt::format("{}: is no plan: {}", file, e.what()));
  }
  const auto n = static_cast<std::size_t>(n_layers);
  require<FormatError>(plan.layers.size() == n, "{}: plans {} layers, expected {}", file,
                       plan.layers.size(), n_layers);
  require<FormatError>(plan.curves.empty() || plan.curves.size() == n, "{}: {} curves, expected {}",
                       file, plan.curves.size(), n_layers);
  return plan;
}

RoutedPlan read_plan(const std::filesystem::path& file, int n_layers) {
  std::ifstream in(file, std::ios::binary);
  require<IoError>(in.good(), "{}: cannot open: {}", file.string(),
                   std::generic_category().message(errno));
  const std::string text(std::istreambuf_iterator<char>(in), {});
  require<IoError>(!in.bad(), "{}: cannot read", file.string());
  return parse_plan(text, file.string(), n_layers);
}

std::string plan_table(const RoutedPlan& plan) {
  std::string text = fmt::format(
      "plan: mean active fraction {:.3f}\n{:>6} {:>7} {:>7} {:>7} {:>7} {:>13}\n",
      plan.active_fraction(), "layer", "active", "inputs", "routed", "kept", "predicted KL");
  for (std::size_t l = 0; l < plan.layers.size(); ++l) {
    const RoutedPlan::Layer& layer = plan.layers[l];
    if (stays_dense(layer)) {
      text += fmt::format("{:>6} {:>7.3f}   stays dense\n", l, layer.fraction);
      continue;
    }
    text += fmt::format("{:>6} {:>7.3f} {:>7.2f} {:>7.2f} {:>7.2f} {:>13.4f}\n", l, layer.fraction,
                        layer.shares.input, plan.up_by_input ? 1 : layer.shares.gate,
                        layer.shares.hidden, layer.predicted);
  }
  text.pop_back();
  return text;
}

}  // namespace moesaic::converter
