#include <nlohmann/json.hpp>

#include "converter/recovery/recover_file.h"
#include "converter/report.h"
#include "converter/report_figures.h"

namespace moesaic::converter {

std::string report_json(const ConvertOptions& options, const ConvertReport& report) {
  using Json = nlohmann::ordered_json;
  Json layers = Json::array();
  for (const LayerReport& l : report.layers) {
    Json layer = {{"layer", l.layer},
                  {"kind", l.kind},
                  {"n_shared", l.n_shared},
                  {"n_experts", l.n_experts},
                  {"expert_neurons", l.expert_neurons},
                  {"n_active", l.n_active},
                  {"router_rank", l.router_rank},
                  {"bypass_rank", l.bypass_rank},
                  {"error_closed_form", l.error_closed_form},
                  {"error_distilled", l.error_distilled},
                  {"active_fraction", l.active_fraction},
                  {"sensitivity", l.sensitivity},
                  {"n_never_selected", never_selected(l)}};
    if (is_self_routed(l)) {
      layer["input_share"] = l.shares.input;
      layer["gate_share"] = l.shares.gate;
      layer["hidden_share"] = l.shares.hidden;
    }
    layers.push_back(std::move(layer));
  }
  Json json = {{"model", options.model.string()},
               {"output", options.output.string()},
               {"data", options.data},
               {"recipe", options.recipe},
               {"seed", options.seed},
               {"n_tokens", report.n_tokens},
               {"seconds", report.seconds},
               {"peak_memory_bytes", report.peak_memory_bytes},
               {"active_fraction", report.active_fraction},
               {"source_digest", report.source_digest},
               {"data_digest", report.data_digest},
               {"layers", std::move(layers)}};
  if (options.device.passes) json["device"] = "cuda";
  if (report.recovery) json["recovery"] = Json::parse(recovery_json(*report.recovery));
  // Not-a-number and infinity dump as null; a path that is not UTF-8 keeps its readable part.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace moesaic::converter
