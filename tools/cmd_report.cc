#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <memory>

#include "converter/runs.h"
#include "models/gguf_writer.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"

namespace moesaic::tools {
namespace {

struct ReportOptions {
  std::string folder;
  std::string output = "md";
};

Json optional_json(const std::optional<double>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json as_json(const std::vector<converter::Run>& runs, const ReportOptions& options) {
  Json json = {{"folder", options.folder}, {"runs", Json::array()}};
  for (const converter::Run& run : runs) {
    Json item = {{"name", run.name},
                 {"source", run.source},
                 {"recipe", run.recipe},
                 {"dense", run.dense},
                 {"active_fraction", run.active_fraction},
                 {"seconds", optional_json(run.seconds)},
                 {"compared", run.quality.has_value()},
                 {"best", run.best}};
    if (run.quality) {
      item["data"] = run.quality->text;
      item["perplexity_dense"] = run.quality->perplexity_dense;
      item["perplexity"] = run.quality->perplexity;
      item["ratio"] = run.quality->ratio;
      item["ratio_out_of_domain"] = optional_json(run.quality->ratio_out);
      item["kl_mean"] = run.quality->kl;
      item["top1_agreement"] = run.quality->same_top;
    }
    json["runs"].push_back(std::move(item));
  }
  return json;
}

std::string as_table(const std::vector<converter::Run>& runs) {
  std::vector<std::vector<std::string>> rows = {{"hybrid", "recipe", "dense", "text", "active",
                                                 "perplexity", "ratio", "out of domain", "KL",
                                                 "same top", "time", "best"}};
  for (const converter::Run& run : runs) {
    const std::string active =
        std::isfinite(run.active_fraction) ? fmt::format("{:.3f}", run.active_fraction) : "";
    const std::string time = run.seconds ? format_seconds(*run.seconds) : "";
    if (!run.quality) {
      rows.push_back({run.name, run.recipe, run.dense, "", active, "", "", "", "", "", time, ""});
      continue;
    }
    const converter::Run::Quality& q = *run.quality;
    rows.push_back({run.name, run.recipe, run.dense, q.text, active,
                    fmt::format("{:.3f}", q.perplexity), fmt::format("{:.3f}", q.ratio),
                    q.ratio_out ? fmt::format("{:.3f}", *q.ratio_out) : "",
                    fmt::format("{:.4f}", q.kl), fmt::format("{:.1f} %", 100 * q.same_top), time,
                    run.best ? "●" : ""});
  }
  return markdown_table(rows);
}

void report(const ReportOptions& options) {
  const bool page = options.output != "md" && options.output != "json";
  if (page) models::check_writable(options.output, 1 << 16);
  const std::vector<converter::Run> runs = converter::read_runs(options.folder);
  if (options.output == "json") return print(to_text(as_json(runs, options)));
  print(as_table(runs));
  if (page) {
    models::write_file_atomically(options.output, converter::runs_page(runs));
    print("\n" + options.output + "\n");
  }
}

}  // namespace

void add_report(CLI::App& app, Action& action) {
  auto options = std::make_shared<ReportOptions>();
  CLI::App* cmd =
      app.add_subcommand("report", "Perplexity against active fraction of all runs in a folder");
  cmd->add_option("FOLDER", options->folder, "Where *.compare.json and *.report.json lie")
      ->required();
  cmd->add_option("-o,--output", options->output,
                  "md, json, or a page to write besides the table (.html)")
      ->check(CLI::Validator(
          [](std::string& found) {
            const bool known = found == "md" || found == "json" ||
                               std::filesystem::path(found).extension() == ".html";
            return known
                       ? std::string()
                       : fmt::format("found '{}', expected md, json or a file named *.html", found);
          },
          "md|json|FILE.html"))
      ->capture_default_str();
  cmd->footer(
      R"(A run is a *.compare.json that `moesaic compare --json-file` wrote; the *.report.json that convert
and recover leave beside a hybrid adds its recipe and time by the hybrid's file name. Runs of one
dense checkpoint and one first text make a picture; the best at each active fraction are joined.

Examples:
  moesaic compare SmolLM2.gguf runs/a.gguf --data wiki.test.raw --json-file runs/a.compare.json
  moesaic report runs
  moesaic report runs -o runs/pareto.html)");
  cmd->callback([options, &action] { action = [options] { report(*options); }; });
}

}  // namespace moesaic::tools
