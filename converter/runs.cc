#include "converter/runs.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kReport = ".report.json";
constexpr std::string_view kCompare = ".compare.json";

std::string file_name(const std::string& path) {
  return std::filesystem::path(path).filename().string();
}

/// A JSON object in a file, and its members with errors that name them.
class Document {
 public:
  Document(const std::filesystem::path& path, std::string_view expected)
      : path_(path), expected_(expected) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    require<IoError>(!file.bad() && file.is_open(), "{}: cannot read", path.string());
    json_ = Json::parse(bytes, nullptr, false);
    if (!json_.is_object()) fail("not a JSON object");
  }

  bool has(const char* key) const { return json_.contains(key); }
  double number(const std::string& pointer) const {
    const Json& value = at(pointer);
    if (!value.is_number()) fail(fmt::format("{} is not a number", pointer));
    return value.get<double>();
  }
  /// Nothing where it stands as null.
  std::optional<double> known(const std::string& pointer) const {
    if (at(pointer).is_null()) return std::nullopt;
    return number(pointer);
  }
  std::string text(const std::string& pointer) const {
    const Json& value = at(pointer);
    if (!value.is_string()) fail(fmt::format("{} is not a string", pointer));
    return value.get<std::string>();
  }
  std::size_t size(const char* key) const { return has(key) ? json_[key].size() : 0; }
  bool contains(const std::string& pointer) const {
    return json_.contains(Json::json_pointer(pointer));
  }

 private:
  const Json& at(const std::string& pointer) const {
    if (!contains(pointer)) fail(fmt::format("no {}", pointer));
    return json_[Json::json_pointer(pointer)];
  }
  [[noreturn]] void fail(const std::string& found) const {
    throw FormatError(
        fmt::format("{}: {}, expected what {} writes", path_.string(), found, expected_));
  }

  std::filesystem::path path_;
  std::string_view expected_;
  Json json_;
};

Run reported_run(const std::filesystem::path& path) {
  const Document report(path, "moesaic convert or recover");
  Run run;
  run.source = path.filename().string();
  run.name = run.source.substr(0, run.source.size() - kReport.size());
  if (report.has("recipe")) {
    run.recipe = report.text("/recipe");
    run.dense = file_name(report.text("/model"));
    run.active_fraction = report.number("/active_fraction");
    run.seconds = report.number("/seconds");
  } else {
    run.recipe = "recover";
    run.dense = file_name(report.text("/dense"));
    run.active_fraction = std::numeric_limits<double>::quiet_NaN();  // the report does not say
    run.seconds = report.number("/recovery/seconds");
  }
  return run;
}

Run compared_run(const std::filesystem::path& path, const std::map<std::string, Run>& reports) {
  const Document compared(path, "moesaic compare --json-file");
  Run run;
  run.source = path.filename().string();
  run.name = file_name(compared.text("/hybrid/model"));
  run.dense = file_name(compared.text("/dense/model"));
  run.recipe = compared.contains("/hybrid/recipe") ? compared.text("/hybrid/recipe") : "?";
  if (const auto report = reports.find(run.name); report != reports.end()) {
    run.seconds = report->second.seconds;
    // A recovered file keeps the recipe of the hybrid that it was made from.
    run.recipe = report->second.recipe != "recover" ? report->second.recipe
                 : run.recipe == "?"                ? "recover"
                                                    : run.recipe + " + recover";
  }
  Run::Quality quality;
  quality.perplexity_dense = compared.number("/dense/perplexity");
  quality.perplexity = compared.number("/hybrid/perplexity");
  quality.ratio = quality.perplexity / quality.perplexity_dense;
  quality.kl = compared.number("/kl_mean");
  quality.same_top = compared.number("/top1_agreement");
  run.active_fraction = compared.number("/hybrid/active_fraction");
  const std::size_t n_texts = compared.size("texts");
  for (std::size_t i = 0; i < n_texts; ++i) {
    const std::string text = fmt::format("/texts/{}", i);
    if (i == 0) {
      quality.text = file_name(compared.text(text + "/data"));
      // A device does not count them.
      run.active_fraction = compared.known(text + "/active_fraction").value_or(run.active_fraction);
    } else {
      quality.ratio_out =
          std::max(quality.ratio_out.value_or(0), compared.number(text + "/ppl_ratio"));
    }
  }
  run.quality = std::move(quality);
  return run;
}

std::vector<std::filesystem::path> files_named(const std::filesystem::path& folder,
                                               std::string_view suffix) {
  std::error_code error;
  std::vector<std::filesystem::path> paths;
  std::filesystem::directory_iterator entries(folder, error);
  require<IoError>(!error, "{}: cannot read the folder: {}", folder.string(), error.message());
  for (const auto& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(suffix) && name.size() > suffix.size()) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

/// Runs stand by group and fraction; of two at one fraction the better comes first.
void mark_best(std::vector<Run>& runs) {
  const Run* previous = nullptr;
  double lowest = 0;
  for (Run& run : runs) {
    if (!run.quality) continue;
    if (previous == nullptr || !run.same_group(*previous)) {
      lowest = std::numeric_limits<double>::infinity();
    }
    run.best = run.quality->ratio < lowest;
    if (run.best) lowest = run.quality->ratio;
    previous = &run;
  }
}

}  // namespace

std::vector<Run> read_runs(const std::filesystem::path& folder) {
  std::map<std::string, Run> reports;
  for (const auto& path : files_named(folder, kReport)) {
    Run run = reported_run(path);
    reports.emplace(run.name, std::move(run));
  }
  std::vector<Run> runs;
  for (const auto& path : files_named(folder, kCompare)) {
    runs.push_back(compared_run(path, reports));
  }
  for (const Run& run : runs) reports.erase(run.name);
  for (auto& [name, run] : reports) runs.push_back(std::move(run));
  require<IoError>(!runs.empty(), "{}: holds no *{} and no *{}", folder.string(), kCompare,
                   kReport);
  std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
    const auto key = [](const Run& run) {
      const bool compared = run.quality.has_value();
      // NaN would order nothing.
      const auto last = std::numeric_limits<double>::infinity();
      const double ratio = compared ? run.quality->ratio : 0;
      return std::make_tuple(!compared, run.dense, compared ? run.quality->text : "",
                             std::isfinite(run.active_fraction) ? run.active_fraction : last,
                             std::isfinite(ratio) ? ratio : last);
    };
    return key(a) < key(b);
  });
  mark_best(runs);
  return runs;
}

}  // namespace moesaic::converter
