#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>

#include "converter/study/figure.h"
#include "converter/study/study.h"
#include "converter/study/study_json.h"
#include "models/gguf_writer.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

namespace study = converter::study;

struct Options {
  study::StudyOptions study;
  std::string model, data, resume, svg, json_file, format;
  std::vector<std::string> inputs = {"real", "gaussian"};
  std::vector<std::string> families = {"low-rank", "full-rank", "dense"};
  RunOptions run;
};

std::string figure(double v) { return std::isfinite(v) ? fmt::format("{:.4f}", v) : "–"; }

// Both columns of an error. A Gaussian has no sinks.
void add_error(std::vector<std::string>& row, const study::Unexplained* u, bool real) {
  row.push_back(u != nullptr ? figure(u->all) : "–");
  row.push_back(u != nullptr && real ? figure(u->without_sinks) : "–");
}

std::string table(const study::StudyReport& report) {
  const study::StudyOptions& o = report.options;
  const bool own = o.own_passes >= 0;
  const bool distilled = o.own_passes > 0;
  bool published = false;
  for (const study::CellResult& cell : report.cells) published |= cell.published.has_value();
  std::vector<std::vector<std::string>> rows = {{"inputs", "student", "active neurons",
                                                 "active fraction", "rate", "unexplained",
                                                 "without sinks"}};
  if (own) rows[0].insert(rows[0].end(), {"ours: active", "closed form", "without sinks"});
  if (distilled) {
    rows[0].insert(rows[0].end(), {fmt::format("{:g} passes", o.own_passes), "without sinks"});
  }
  if (published) rows[0].emplace_back("paper's*");
  for (const study::CellResult& cell : report.cells) {
    const bool real = cell.cell.inputs == study::Inputs::Real;
    std::vector<std::string>& row = rows.emplace_back();
    row = {std::string(study::inputs_name(cell.cell.inputs)),
           std::string(study::family_name(cell.cell.shape.family)),
           std::to_string(cell.cell.n_neurons), fmt::format("{:.3f}", cell.active_fraction),
           std::isfinite(cell.rate) ? fmt::format("{:g}", cell.rate) : "–"};
    add_error(row, &cell.held_out, real);
    if (own) {
      row.push_back(cell.own ? fmt::format("{:.3f}", cell.own->active_fraction) : "–");
      add_error(row, cell.own ? &cell.own->closed_form : nullptr, real);
    }
    if (distilled) {
      add_error(row, cell.own && cell.own->distilled ? &*cell.own->distilled : nullptr, real);
    }
    if (published) row.push_back(cell.published ? fmt::format("{:.4f}", *cell.published) : "–");
  }
  std::string text = fmt::format(
      "{}\nShare of the variance of the MLP's output left unexplained, {} layer {}, on {} held-out "
      "tokens ({} of them\nsinks, with {:.1f} % of the variance); {} tokens trained on in {:g} "
      "passes, {} more chose the rate of {:g}.\n{} experts, router rank {}, batches of {}, {} "
      "activations, seed {}; {}.\nActive fraction: multiply-adds per token over the dense MLP's, "
      "router counted.\n",
      markdown_table(rows), report.name, report.layer, report.n_held_out, report.n_held_out_sinks,
      100 * report.sink_share, report.n_fit, o.train.passes, report.n_choose,
      fmt::join(o.train.rates, ", "), o.n_experts, o.router_rank, o.train.batch, report.activations,
      o.train.seed, format_seconds(report.seconds));
  if (own) {
    text +=
        "Ours: started from the teacher's neurons, at the row's multiply-adds or fewer; – where "
        "the dense MLP costs less.\n";
  }
  if (published) {
    text +=
        "* arXiv 2512.18452: Gemma-3-270M layer 9, WikiText-2, 100 passes, 10,000 experts. Not "
        "comparable in absolute\nterms (which tokens its data held is not known): compare "
        "orderings and shapes.\n";
  }
  return text;
}

void run(Options& options) {
  study::StudyOptions& o = options.study;
  o.model = options.model;
  o.data = options.data;
  o.resume = options.resume;
  o.inputs.clear();
  for (const std::string& name : options.inputs) o.inputs.push_back(*study::inputs_from_name(name));
  o.families.clear();
  for (const std::string& name : options.families) {
    o.families.push_back(*study::family_from_name(name));
  }
  for (const std::string& file : {options.svg, options.json_file}) {
    if (!file.empty()) models::check_writable(file, 1 << 20);
  }
  Runtime runtime(options.run);
  Progress progress(options.run.quiet);
  study::StudyReport report;
  try {
    report = study::run_study(o, runtime.context, progress);
  } catch (const Interrupted&) {
    throw Interrupted(
        options.resume.empty()
            ? "interrupted: nothing is kept without --resume FOLDER"
            : fmt::format("interrupted: finished cells are kept in {}; the same command goes on",
                          options.resume));
  }
  const Json json = study::to_json(report);
  if (!options.svg.empty()) models::write_file_atomically(options.svg, study::figure_svg(report));
  if (!options.json_file.empty()) models::write_file_atomically(options.json_file, to_text(json));
  print(options.format == "json"  ? to_text(json)
        : options.format == "svg" ? study::figure_svg(report)
                                  : table(report));
}

template <class T>
CLI::Option* add_list(CLI::App& cmd, const std::string& name, std::vector<T>& values,
                      const CLI::Validator& check, const std::string& type,
                      const std::string& help) {
  return cmd.add_option(name, values, help)
      ->check(check)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name(type)
      ->capture_default_str();
}

}  // namespace

void add_study(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  study::StudyOptions& o = options->study;
  CLI::App* cmd = app.add_subcommand("study", "The papers' tables: students of one layer");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf)")->required();
  cmd->add_option("--layer", o.layer, "Layer whose MLP is studied")
      ->required()
      ->check(integer_between(0, 1 << 20));
  cmd->add_option("--data", options->data, "Text file that the activations come from")->required();
  cmd->add_option("--tokens", o.tokens, "Tokens of it, evenly over the file (default: all)")
      ->check(integer_between(1, std::int64_t{1} << 40));
  add_list(*cmd, "--active-neurons", o.active_neurons, integer_between(1, 1 << 20), "N[,N]",
           "Neurons active per token: half of them shared, half selected");
  add_list(*cmd, "--families", options->families, CLI::IsMember({"low-rank", "full-rank", "dense"}),
           "NAME[,NAME]", "Students: low-rank or full-rank router, or a dense MLP");
  add_list(*cmd, "--inputs", options->inputs, CLI::IsMember({"real", "gaussian"}), "NAME[,NAME]",
           "Activations of the text, or a Gaussian of the same mean and covariance");
  cmd->add_option("--passes", o.train.passes, "Passes over the tokens; the papers' 100")
      ->check(finite_between(1e-6, 1e6))
      ->capture_default_str();
  add_list(*cmd, "--rates", o.train.rates, finite_between(1e-9, 1e3), "F[,F]",
           "Learning rates, of which the best is kept");
  cmd->add_option("--batch-size", o.train.batch, "Tokens per step")
      ->check(integer_between(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--experts", o.n_experts, "Experts to select from")
      ->check(integer_between(1, 1 << 24))
      ->capture_default_str();
  cmd->add_option("--rank", o.router_rank, "Rank of the low-rank router")
      ->check(integer_between(1, 1 << 16))
      ->capture_default_str();
  cmd->add_option("--own-passes", o.own_passes,
                  "Passes that distill our own start beside each row; 0: closed form only, -1: "
                  "leave it out")
      ->check(finite_between(-1, 3))
      ->capture_default_str();
  cmd->add_option("--seed", o.train.seed, "Seed of everything that is drawn")
      ->check(integer_between(0, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  cmd->add_option("--resume", options->resume,
                  "Folder for the results of finished cells; those that are there are taken over")
      ->type_name("FOLDER");
  cmd->add_option("--svg", options->svg, "Also write the picture there")->type_name("FILE");
  cmd->add_option("--json-file", options->json_file, "Also write the JSON there")
      ->type_name("FILE");
  add_output_option(*cmd, options->format, {"md", "json", "svg"});
  options->run.activations = "bf16";
  add_run_options(*cmd, options->run);
  cmd->footer(
      R"(Trains students of one layer from a random start by the protocol of arXiv 2512.18452 and prints
the share of the output's variance that each leaves unexplained on held-out tokens. Products with the
router and with shared neurons in bfloat16 (--activations f32: float32), experts in float32. Sinks:
tokens that open a window of 512 or whose output is more than ten times as long as the median.

Examples:
  moesaic study gemma.gguf --layer 9 --data wiki.valid.tokens --passes 3 --active-neurons 16,64,256
  moesaic study gemma.gguf --layer 9 --data wiki.train.tokens --passes 100 --resume cells --svg study.svg
  moesaic study smol.gguf --layer 15 --data text.txt --families dense --inputs real -o json)");
  cmd->callback([options, &action] { action = [options] { run(*options); }; });
}

}  // namespace moesaic::tools
