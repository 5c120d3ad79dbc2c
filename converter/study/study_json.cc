#include "converter/study/study_json.h"

#include <cmath>
#include <limits>

#include "kernels/base/error.h"

namespace moesaic::converter::study {
namespace {

using Json = nlohmann::ordered_json;

Json number_or_null(double v) { return std::isfinite(v) ? Json(v) : Json(); }

double number(const nlohmann::json& j) {
  return j.is_null() ? std::numeric_limits<double>::quiet_NaN() : j.get<double>();
}

Unexplained unexplained(const nlohmann::json& j, const char* key, const char* without_key) {
  return {number(j.at(key)), number(j.at(without_key))};
}

}  // namespace

Json to_json(const OwnStart& own) {
  const auto distilled = [&](double Unexplained::*part) {
    return own.distilled ? number_or_null((*own.distilled).*part) : Json();
  };
  return {{"active_fraction", own.active_fraction},
          {"n_shared", own.plan.n_shared},
          {"n_active", own.plan.n_active},
          {"router_rank", own.plan.router_rank},
          {"bypass_rank", own.plan.bypass_rank},
          {"closed_form", number_or_null(own.closed_form.all)},
          {"closed_form_without_sinks", number_or_null(own.closed_form.without_sinks)},
          {"distilled", distilled(&Unexplained::all)},
          {"distilled_without_sinks", distilled(&Unexplained::without_sinks)}};
}

Json to_json(const CellResult& r) {
  Json by_rate = Json::array();
  for (const RateResult& rate : r.by_rate) {
    by_rate.push_back({{"rate", rate.rate},
                       {"training_loss", number_or_null(rate.training_loss)},
                       {"chosen_by", number_or_null(rate.chosen_by)}});
  }
  const StudentShape& s = r.cell.shape;
  return {{"inputs", inputs_name(r.cell.inputs)},
          {"family", family_name(s.family)},
          {"active_neurons", r.cell.n_neurons},
          {"n_shared", s.n_shared},
          {"n_experts", s.n_experts},
          {"n_active", s.n_active},
          {"router_rank", s.router_rank},
          {"active_fraction", r.active_fraction},
          {"unexplained", number_or_null(r.held_out.all)},
          {"unexplained_without_sinks", number_or_null(r.held_out.without_sinks)},
          {"rate", number_or_null(r.rate)},
          {"by_rate", by_rate},
          {"seconds", r.seconds},
          {"own", r.own ? to_json(*r.own) : Json()},
          {"published", r.published ? Json(*r.published) : Json()}};
}

Json to_json(const StudyReport& report) {
  Json cells = Json::array();
  for (const CellResult& cell : report.cells) cells.push_back(to_json(cell));
  const TrainOptions& train = report.options.train;
  return {{"model", report.model},
          {"name", report.name},
          {"source_digest", report.source_digest},
          {"data", report.data},
          {"data_digest", report.data_digest},
          {"layer", report.layer},
          {"d_model", report.d_model},
          {"d_ff", report.d_ff},
          {"n_tokens", report.n_tokens},
          {"n_fit", report.n_fit},
          {"n_choose", report.n_choose},
          {"n_held_out", report.n_held_out},
          {"n_sinks", report.n_sinks},
          {"n_held_out_sinks", report.n_held_out_sinks},
          {"sink_share", number_or_null(report.sink_share)},
          {"passes", train.passes},
          {"batch", train.batch},
          {"rates", train.rates},
          {"seed", train.seed},
          {"activations", report.activations},
          {"n_threads", report.n_threads},
          {"seconds", report.seconds},
          {"cells", cells}};
}

void read_cell(const nlohmann::json& json, const std::string& file, CellResult& result) {
  try {
    result.held_out = unexplained(json, "unexplained", "unexplained_without_sinks");
    result.rate = number(json.at("rate"));
    result.seconds = json.at("seconds").get<double>();
    for (const auto& rate : json.at("by_rate")) {
      result.by_rate.push_back({rate.at("rate").get<double>(), number(rate.at("training_loss")),
                                number(rate.at("chosen_by"))});
    }
  } catch (const nlohmann::json::exception& e) {
    throw FormatError(fmt::format("{}: is no kept cell: {}", file, e.what()));
  }
}

OwnStart read_own(const nlohmann::json& json, const std::string& file) {
  try {
    OwnStart own;
    own.plan.n_shared = json.at("n_shared");
    own.plan.n_active = json.at("n_active");
    own.plan.router_rank = json.at("router_rank");
    own.plan.bypass_rank = json.at("bypass_rank");
    own.active_fraction = json.at("active_fraction");
    own.closed_form = unexplained(json, "closed_form", "closed_form_without_sinks");
    if (!json.at("distilled").is_null()) {
      own.distilled = unexplained(json, "distilled", "distilled_without_sinks");
    }
    return own;
  } catch (const nlohmann::json::exception& e) {
    throw FormatError(fmt::format("{}: is no kept start: {}", file, e.what()));
  }
}

}  // namespace moesaic::converter::study
