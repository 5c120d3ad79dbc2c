#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "converter/self_routed/curves.h"

namespace moesaic::converter {

/// What each layer of a self-routed hybrid becomes.
struct RoutedPlan {
  struct Layer {
    Shares shares;         // all 1: the layer stays dense
    double fraction = 1;   // active_fraction(shares)
    double predicted = 0;  // KL divergence from the dense model with this layer alone converted
  };
  bool up_by_input = false;
  std::vector<Layer> layers;
  std::vector<LayerCurve> curves;  // what it was made from; empty where nothing was measured

  double active_fraction() const;
};

bool stays_dense(const RoutedPlan::Layer& layer);

/// A plan for a mean active fraction from measured curves. Throws as allot().
RoutedPlan make_plan(std::vector<LayerCurve> curves, double active, Budget budget);

/// Magnitude thresholds alone, one share for all matrices of all layers (TEAL's uniform form).
RoutedPlan threshold_plan(int n_layers, double active);

/// As JSON: {"moesaic_plan": 1, "kind": "glu+gate" or "glu+input", "active_fraction", "layers":
/// [{layer, input_share, gate_share, hidden_share, active_fraction, predicted_kl}], "curves":
/// [{path:
/// [[input, gate, hidden, error], …], measured: [[fraction, KL], …]}]}; and back: a layer needs its
/// shares alone, the rest is derived or for the reader. Throws FormatError naming `file` and what
/// is wrong.
std::string plan_json(const RoutedPlan& plan);
RoutedPlan parse_plan(const std::string& text, const std::string& file, int n_layers);

/// parse_plan of a file. Throws IoError too.
RoutedPlan read_plan(const std::filesystem::path& file, int n_layers);

/// The plan as a table to read before time is spent on it.
std::string plan_table(const RoutedPlan& plan);

}  // namespace moesaic::converter
