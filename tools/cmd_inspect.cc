#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <memory>

#include "models/expert_usage.h"
#include "models/mixture_file.h"
#include "models/mlp.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"
#include "tools/commands.h"
#include "tools/expert_output.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

constexpr std::int64_t kTopTokens = 10;    // of each of --experts
constexpr std::size_t kShownPerLayer = 3;  // experts whose tokens are shown, without --experts
constexpr std::size_t kLongText = 60;      // metadata text beyond this is cut in the table

struct InspectOptions {
  std::string model;
  std::string text;
  std::string data;
  bool from_text = false;  // one of the two is given
  models::ChunkOptions chunks;
  std::vector<models::ExpertId> experts;
  std::int64_t top_tokens = 0;
  std::string format;
  RunOptions run;
};

// ---- metadata ----------------------------------------------------------------------------------

Json to_json(const models::GgufValue& value) {
  return std::visit(
      [](const auto& v) -> Json {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, models::GgufArray>) {
          return std::visit([](const auto& items) { return Json(items); }, v.items);
        } else {
          return Json(v);
        }
      },
      value.value);
}

/// Vocabularies have 100,000 entries: arrays are told by their length, except short ones.
Json metadata_json(const models::GgufFile& file) {
  Json out = Json::object();
  for (const auto& [key, value] : file.metadata()) {
    Json item = to_json(value);
    if (item.is_array() && item.size() > 64) item = fmt::format("[{} items]", item.size());
    out[key] = std::move(item);
  }
  return out;
}

// ---- layers ------------------------------------------------------------------------------------

Json layer_json(const models::Checkpoint& checkpoint, std::size_t layer) {
  const models::Mlp& mlp = checkpoint.layers[layer].mlp;
  const double dense = 3.0 * static_cast<double>(checkpoint.config.d_model) *
                       static_cast<double>(checkpoint.config.d_ff);
  Json out = {{"layer", layer}};
  if (const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp)) {
    out["kind"] = routed->up_by_input ? models::kKindGluInput : models::kKindGluGate;
    out["input_share"] = routed->input_share;
    if (!routed->up_by_input) out["gate_share"] = routed->gate_share;
    out["hidden_share"] = routed->hidden_share;
    out["dtype"] = traits(routed->w_up.dtype).name;
  } else if (const auto* moe = std::get_if<kernels::SecretMoeView>(&mlp)) {
    out["kind"] = models::kKindGluLowRank;
    out["n_shared"] = moe->n_shared();
    out["n_experts"] = moe->n_experts();
    out["expert_neurons"] = 1;
    out["n_active"] = moe->n_active;
    out["router_rank"] = moe->router_rank();
    out["bypass_rank"] = moe->bypass_rank();
    out["expert_dtype"] = traits(moe->experts.dtype).name;
    out["router_dtype"] = traits(moe->router_v.dtype).name;
  } else if (const auto* mixture = std::get_if<kernels::MixtureView>(&mlp)) {
    out["kind"] = models::kind_name(mixture->kind);
    out["n_shared"] = mixture->n_shared();
    out["n_experts"] = mixture->n_experts();
    out["expert_neurons"] = mixture->block;
    out["n_active"] = mixture->n_active;
    out["router_rank"] = mixture->router_rank();
    out["bypass_rank"] = mixture->bypass_rank();
    out["expert_dtype"] = traits(mixture->experts.dtype).name;
    out["router_dtype"] = traits(mixture->router_u.dtype).name;
  } else {
    const auto& weights = std::get<models::DenseMlp>(mlp);
    out["kind"] = models::kKindDense;
    out["dtype"] = traits(weights.w_up.dtype).name;
  }
  out["active_fraction"] = static_cast<double>(models::multiply_adds(mlp)) / dense;
  return out;
}

std::string cell(const Json& object, const char* key) {
  if (!object.contains(key)) return "";
  const Json& value = object[key];
  if (value.is_string()) return value.get<std::string>();
  return value.is_number_float() ? fmt::format("{:.3f}", value.get<double>()) : value.dump();
}

// ---- which experts fire ------------------------------------------------------------------------

/// Windows of n_ctx ids, BOS in front of each where the model wants it, one behind the other: of
/// --data as many as asked for, of -p the whole text in one.
std::vector<std::int32_t> windows(const InspectOptions& options, const Model& model,
                                  std::int64_t& n_ctx) {
  const models::Tokenizer& tokenizer = *model.tokenizer;
  const std::int64_t context = model.transformer.shape().context_length;
  const bool bos = tokenizer.add_bos && tokenizer.bos.has_value();
  std::vector<std::int32_t> text;
  if (options.data.empty()) {
    text = tokenizer.encode(options.text, models::SpecialTokens::Text);
    n_ctx = static_cast<std::int64_t>(text.size()) + (bos ? 1 : 0);
    require<InputError>(n_ctx > 0, "-p: empty, expected text");
    require<InputError>(n_ctx <= context, "-p: {} tokens, the model's context is {}", n_ctx,
                        context);
  } else {
    text = read_data(options.data, tokenizer);
    n_ctx = std::min(options.chunks.n_ctx, context);
  }
  const std::int64_t step = n_ctx - (bos ? 1 : 0);
  const auto n_text = static_cast<std::int64_t>(text.size());
  std::vector<std::int32_t> ids;
  std::int64_t first = 0;
  for (std::int64_t n = 0; n == 0 || (first < n_text && n != options.chunks.n_chunks); ++n) {
    if (bos) ids.push_back(*tokenizer.bos);
    const std::int64_t end = std::min(first + step, n_text);
    ids.insert(ids.end(), text.begin() + first, text.begin() + end);
    first = end;
  }
  return ids;
}

/// The experts whose tokens are shown: those asked for, or the most used of each layer.
std::vector<models::ExpertId> shown_experts(const InspectOptions& options,
                                            const models::ExpertUsage& usage) {
  if (!options.experts.empty() || options.top_tokens == 0) return options.experts;
  std::vector<models::ExpertId> experts;
  for (std::size_t l = 0; l < usage.counts.size(); ++l) {
    for (const std::int64_t e : most_used(usage.counts[l], kShownPerLayer)) {
      experts.push_back({static_cast<int>(l), e});
    }
  }
  return experts;
}

struct Fired {
  Json json;
  std::string tables;
};

Fired fired_experts(const InspectOptions& options) {
  Runtime runtime(options.run);
  Model model(options.model, runtime.context);
  Progress progress(options.run.quiet);
  std::int64_t n_ctx = 0;
  const std::vector<std::int32_t> ids = windows(options, model, n_ctx);
  const models::ExpertUsage usage = models::count_experts(model.transformer, ids, n_ctx, progress);
  Fired fired{usage_json(usage), usage_table(usage)};
  const std::vector<models::ExpertId> experts = shown_experts(options, usage);
  if (experts.empty()) return fired;
  const auto n = static_cast<std::size_t>(options.top_tokens > 0 ? options.top_tokens : kTopTokens);
  std::vector<std::vector<models::Firing>> firings =
      models::strongest_firings(model.transformer, ids, n_ctx, experts, n, progress);
  std::vector<ExpertTokens> shown;
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const std::int64_t count = usage.counts[static_cast<std::size_t>(experts[i].layer)]
                                           [static_cast<std::size_t>(experts[i].expert)];
    shown.push_back({experts[i], static_cast<double>(count) / static_cast<double>(ids.size()),
                     std::move(firings[i])});
  }
  fired.json["top_tokens"] = tokens_json(shown, ids, n_ctx, *model.tokenizer);
  fired.tables += tokens_tables(fired.json["top_tokens"]);
  return fired;
}

// ---- the whole ---------------------------------------------------------------------------------

Json describe(const models::Checkpoint& checkpoint) {
  const models::GgufFile& file = *checkpoint.file;
  const models::ModelConfig& config = checkpoint.config;
  const TensorTotals totals = tensor_totals(file);
  std::map<std::string, std::int64_t> by_dtype;
  for (const models::GgufTensor& tensor : file.tensors()) {
    by_dtype[std::string(traits(tensor.dtype).name)] += tensor.bytes;
  }
  Json layers = Json::array();
  for (std::size_t l = 0; l < checkpoint.layers.size(); ++l) {
    layers.push_back(layer_json(checkpoint, l));
  }
  return {{"file", file.path().string()},
          {"file_bytes", file.file_bytes()},
          {"gguf_version", file.version()},
          {"architecture", config.architecture},
          {"name", config.name},
          {"n_params", totals.elements},
          {"tensor_bytes", totals.bytes},
          {"bytes_by_dtype", by_dtype},
          {"n_layers", config.n_layers},
          {"d_model", config.d_model},
          {"d_ff", config.d_ff},
          {"n_heads", config.n_heads},
          {"n_kv_heads", config.n_kv_heads},
          {"head_dim", config.head_dim},
          {"vocab_size", config.vocab_size},
          {"context_length", config.context_length},
          {"active_fraction", checkpoint.active_fraction()},
          {"layers", std::move(layers)},
          {"metadata", metadata_json(file)}};
}

std::string as_tables(const Json& description) {
  std::vector<std::vector<std::string>> facts = {{"", "value"}};
  for (const auto& [key, value] : description.items()) {
    if (value.is_structured()) continue;
    facts.push_back({key, cell(description, key.c_str())});
  }
  for (const auto& [dtype, bytes] : description["bytes_by_dtype"].items()) {
    facts.push_back({"bytes in " + dtype, bytes.dump()});
  }
  std::vector<std::vector<std::string>> metadata = {{"metadata", "value"}};
  for (const auto& [key, value] : description["metadata"].items()) {
    std::string text = to_text(value, false);
    text.pop_back();
    if (text.size() > kLongText) text = fmt::format("[{} characters]", text.size());
    std::replace(text.begin(), text.end(), '|', '/');
    metadata.push_back({key, text});
  }
  std::vector<std::vector<std::string>> layers = {{"layer", "kind", "shared", "experts", "selected",
                                                   "neurons each", "router rank", "bypass rank",
                                                   "dtype", "active"}};
  for (const Json& layer : description["layers"]) {
    layers.push_back({cell(layer, "layer"), cell(layer, "kind"), cell(layer, "n_shared"),
                      cell(layer, "n_experts"), cell(layer, "n_active"),
                      cell(layer, "expert_neurons"), cell(layer, "router_rank"),
                      cell(layer, "bypass_rank"),
                      cell(layer, layer.contains("dtype") ? "dtype" : "expert_dtype"),
                      cell(layer, "active_fraction")});
  }
  return fmt::format("{}\n{}\n{}", markdown_table(facts), markdown_table(layers),
                     markdown_table(metadata));
}

void inspect(const InspectOptions& options) {
  const auto checkpoint = models::Checkpoint::load(options.model);
  Json description = describe(*checkpoint);
  std::string text = options.format == "md" ? as_tables(description) : "";
  if (options.from_text) {
    Fired fired = fired_experts(options);
    description["experts"] = std::move(fired.json);
    text += "\n" + fired.tables;
  }
  print(options.format == "md" ? text : to_text(description));
}

}  // namespace

namespace {

/// "L:E", or nothing.
std::optional<models::ExpertId> parse_expert(const std::string& text) {
  models::ExpertId id;
  const char* const end = text.data() + text.size();
  const auto layer = std::from_chars(text.data(), end, id.layer);
  if (layer.ec != std::errc() || layer.ptr == end || *layer.ptr != ':') return std::nullopt;
  const auto expert = std::from_chars(layer.ptr + 1, end, id.expert);
  if (expert.ec != std::errc() || expert.ptr != end) return std::nullopt;
  return id;
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* cmd =
      app.add_subcommand("inspect", "Metadata, layers, experts, bytes; which experts fire");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf), dense or hybrid")->required();
  CLI::Option* text =
      cmd->add_option("-p,--prompt", options->text, "Also show which experts fire for this text");
  CLI::Option* data = cmd->add_option(
      "--data", options->data, "Likewise for a text file, in windows of --n-ctx; .u32: token ids");
  text->excludes(data);
  add_chunk_options(*cmd, options->chunks);
  auto expert_texts = std::make_shared<std::vector<std::string>>();
  CLI::Option* experts =
      cmd->add_option("--experts", *expert_texts,
                      "Show the tokens that fire these experts most: LAYER:EXPERT, …")
          ->delimiter(',')
          ->allow_extra_args(false)
          ->check(CLI::Validator(
              [](std::string& found) {
                return parse_expert(found)
                           ? std::string()
                           : fmt::format("found '{}', expected LAYER:EXPERT", found);
              },
              "LAYER:EXPERT"));
  CLI::Option* top =
      cmd->add_option("--top-tokens", options->top_tokens,
                      "How many tokens of each (10); without --experts of the 3 most used of every "
                      "layer")
          ->check(integer_between(1, 1000));
  add_output_option(*cmd, options->format, {"md", "json"});
  options->run.activations = "f32";
  add_run_options(*cmd, options->run);
  cmd->footer(R"(Examples:
  moesaic inspect hybrid.gguf
  moesaic inspect hybrid.gguf -p "The river Rhine rises in the Alps." -o json
  moesaic inspect hybrid.gguf --data text.txt --chunks 20 --experts 4:17,4:902 --top-tokens 20)");
  cmd->callback([options, expert_texts, text, data, experts, top, &action] {
    options->from_text = text->count() > 0 || data->count() > 0;
    if (!options->from_text && (experts->count() > 0 || top->count() > 0)) {
      throw UsageError("--experts and --top-tokens need a text: -p or --data");
    }
    for (const std::string& expert : *expert_texts) {
      options->experts.push_back(*parse_expert(expert));
    }
    action = [options] { inspect(*options); };
  });
}

}  // namespace moesaic::tools
