#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "tests/models/tiny_model.h"

namespace moesaic::converter {

/// A change to a TinyModel that makes these dense layers self-routed, with random thresholds that
/// leave about half of everything. `moe_layers`: those of the model's options, kept.
inline std::function<void(models::TinyModel&)> self_route(std::vector<int> layers, bool up_by_input,
                                                          int n_layers,
                                                          std::vector<int> moe_layers = {}) {
  return [=](models::TinyModel& m) {
    using models::GgufValue;
    using models::TinyModel;
    std::vector<std::string> kinds(static_cast<std::size_t>(n_layers), "dense");
    std::vector<double> input(kinds.size(), 1), gate(kinds.size(), 1), hidden(kinds.size(), 1);
    for (const int l : moe_layers) kinds[static_cast<std::size_t>(l)] = "glu+low_rank";
    for (const int l : layers) {
      const auto i = static_cast<std::size_t>(l);
      kinds[i] = up_by_input ? "glu+input" : "glu+gate";
      input[i] = 0.6;
      gate[i] = up_by_input ? 1 : 0.55;
      hidden[i] = 0.4;
      const std::string b = "blk." + std::to_string(l) + ".moe.";
      m.add(b + "input_threshold", DType::F32, {TinyModel::kModel}, 0.02, 0.5);
      if (!up_by_input) m.add(b + "gate_threshold", DType::F32, {TinyModel::kFf}, 0.01, 0.15);
      m.add(b + "hidden_threshold", DType::F32, {TinyModel::kFf}, 0.005, 0.08);
    }
    m.set("moesaic.format_version", GgufValue::u32(1));
    m.set("moesaic.layer.kind", GgufValue::string_array(kinds));
    m.set("moesaic.layer.input_share", GgufValue::f32_array(input));
    m.set("moesaic.layer.gate_share", GgufValue::f32_array(gate));
    m.set("moesaic.layer.hidden_share", GgufValue::f32_array(hidden));
    m.set("moesaic.active_fraction", GgufValue::f32(0.5F));
  };
}

/// Other up rows than the seed gives, so that there is much to learn.
inline void replace_up(models::TinyModel& m, const std::vector<int>& layers) {
  using models::TinyModel;
  for (const int l : layers) {
    const std::string name = "blk." + std::to_string(l) + ".ffn_up.weight";
    m.erase_tensor(name);
    m.add(name, DType::F32, {TinyModel::kFf, TinyModel::kModel},
          1 / std::sqrt(static_cast<double>(TinyModel::kModel)));
  }
}

}  // namespace moesaic::converter
