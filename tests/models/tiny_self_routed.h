#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "tests/models/tiny_model.h"

namespace moesaic::models {

/// Sets all of an F32 tensor to one value.
inline void set_floats(TinyModel& m, const std::string& name, float value) {
  auto& data = m.tensor(name).data;
  for (std::size_t i = 0; i < data.size(); i += sizeof(value)) {
    std::memcpy(data.data() + i, &value, sizeof(value));
  }
}

/// Makes each layer the kind that `kinds` has for it ("dense", "glu+gate", "glu+input", or
/// "glu+low_rank" where TinyOptions::moe_layers has it); thresholds of a self-routed one are all
/// `threshold`, those of its input `input_threshold`.
inline void add_self_routed(TinyModel& m, const std::vector<std::string>& kinds, float threshold,
                            float input_threshold) {
  const auto thresholds = [&m](const std::string& name, std::int64_t n, float value) {
    m.add(name, DType::F32, {n}, 0);
    set_floats(m, name, value);
  };
  std::vector<std::uint64_t> active;
  std::vector<double> input, gate, hidden;
  for (std::size_t l = 0; l < kinds.size(); ++l) {
    const bool by_gate = kinds[l] == "glu+gate", by_input = kinds[l] == "glu+input";
    active.push_back(kinds[l] == "glu+low_rank" ? TinyModel::kActive : 0);
    input.push_back(by_gate ? 0.5 : by_input ? 0.25 : 1);
    gate.push_back(by_gate ? 0.5 : 1);
    hidden.push_back(by_gate ? 0.5 : by_input ? 0.125 : 1);
    const std::string b = "blk." + std::to_string(l) + ".moe.";
    if (by_gate || by_input) {
      thresholds(b + "input_threshold", TinyModel::kModel, input_threshold);
      thresholds(b + "hidden_threshold", TinyModel::kFf, threshold);
    }
    if (by_gate) thresholds(b + "gate_threshold", TinyModel::kFf, threshold);
  }
  m.set("moesaic.format_version", GgufValue::u32(1));
  m.set("moesaic.layer.kind", GgufValue::string_array(kinds));
  m.set("moesaic.layer.n_active", GgufValue::u32_array(active));
  m.set("moesaic.layer.input_share", GgufValue::f32_array(input));
  m.set("moesaic.layer.gate_share", GgufValue::f32_array(gate));
  m.set("moesaic.layer.hidden_share", GgufValue::f32_array(hidden));
  for (const char* key : {"recipe", "data_digest", "source_digest", "source_file"}) {
    m.set(std::string("moesaic.") + key, GgufValue::string("test"));
  }
  m.set("moesaic.active_fraction", GgufValue::f32(0.5F));
}

}  // namespace moesaic::models
