#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>

#include "engine/kv_cache.h"
#include "models/mlp.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

constexpr std::size_t kMostUsed = 8;   // experts listed per layer
constexpr std::size_t kLongText = 60;  // metadata text beyond this is cut in the table

struct InspectOptions {
  std::string model;
  std::string text;
  bool from_text = false;
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
    out["n_active"] = moe->n_active;
    out["router_rank"] = moe->router_rank();
    out["bypass_rank"] = moe->bypass_rank();
    out["expert_dtype"] = traits(moe->experts.dtype).name;
    out["router_dtype"] = traits(moe->router_v.dtype).name;
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

/// Per layer: how often each expert was selected, [n_experts] (empty for a dense layer).
using Usage = std::vector<std::vector<std::int64_t>>;

Usage expert_usage(Model& model, std::span<const std::int32_t> ids, engine::Monitor& monitor) {
  models::Transformer& transformer = model.transformer;
  const models::ModelConfig& config = transformer.config();
  Usage usage(static_cast<std::size_t>(config.n_layers));
  for (std::size_t l = 0; l < usage.size(); ++l) {
    if (const auto* moe = std::get_if<kernels::SecretMoeView>(&model.checkpoint->layers[l].mlp)) {
      usage[l].resize(static_cast<std::size_t>(moe->n_experts()));
    }
  }
  transformer.set_selection_observer(
      [&](int layer, std::int64_t, std::span<const std::int32_t> selected) {
        for (const std::int32_t expert : selected) {
          ++usage[static_cast<std::size_t>(layer)][static_cast<std::size_t>(expert)];
        }
      });
  const auto n = static_cast<std::int64_t>(ids.size());
  engine::KvCache cache(config.n_layers, 1, n, config.n_kv_heads, config.head_dim);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  constexpr std::int64_t kBatch = 256;
  monitor.stage("run the text", n);
  for (std::int64_t first = 0; first < n; first += kBatch) {
    monitor.check();
    const std::int64_t size = std::min(kBatch, n - first);
    std::vector<std::int32_t> positions(static_cast<std::size_t>(size));
    std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first));
    const std::vector<std::int32_t> slots(positions.size(), 0);
    const std::int32_t last = static_cast<std::int32_t>(size) - 1;
    transformer.forward({.tokens = ids.subspan(static_cast<std::size_t>(first), positions.size()),
                         .slots = slots,
                         .positions = positions,
                         .outputs = {&last, 1}},
                        cache, Matrix(logits.data(), 1, config.vocab_size));
    monitor.advance(first + size, {});
  }
  transformer.set_selection_observer({});
  return usage;
}

Json usage_json(const Usage& usage, std::int64_t n_tokens) {
  Json layers = Json::array();
  for (std::size_t l = 0; l < usage.size(); ++l) {
    const std::vector<std::int64_t>& count = usage[l];
    if (count.empty()) continue;
    std::vector<std::size_t> order(count.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return count[a] > count[b]; });
    Json most = Json::array();
    for (std::size_t i = 0; i < std::min(kMostUsed, order.size()) && count[order[i]] > 0; ++i) {
      most.push_back(
          {{"expert", order[i]},
           {"share", static_cast<double>(count[order[i]]) / static_cast<double>(n_tokens)}});
    }
    layers.push_back(
        {{"layer", l},
         {"n_experts", count.size()},
         {"n_used", std::count_if(count.begin(), count.end(), [](auto n) { return n > 0; })},
         {"most_used", std::move(most)}});
  }
  return {{"n_tokens", n_tokens}, {"layers", std::move(layers)}};
}

std::string usage_table(const Json& usage) {
  std::vector<std::vector<std::string>> rows = {
      {"layer", "experts used", "most used (share of tokens)"}};
  for (const Json& layer : usage["layers"]) {
    std::string most;
    for (const Json& item : layer["most_used"]) {
      most += fmt::format("{}{} ({:.0f} %)", most.empty() ? "" : ", ", item["expert"].get<int>(),
                          100 * item["share"].get<double>());
    }
    rows.push_back({layer["layer"].dump(),
                    fmt::format("{} of {}", layer["n_used"].dump(), layer["n_experts"].dump()),
                    most});
  }
  return markdown_table(rows);
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
                                                   "router rank", "bypass rank", "dtype",
                                                   "active"}};
  for (const Json& layer : description["layers"]) {
    layers.push_back({cell(layer, "layer"), cell(layer, "kind"), cell(layer, "n_shared"),
                      cell(layer, "n_experts"), cell(layer, "n_active"), cell(layer, "router_rank"),
                      cell(layer, "bypass_rank"),
                      cell(layer, layer.contains("dtype") ? "dtype" : "expert_dtype"),
                      cell(layer, "active_fraction")});
  }
  return fmt::format("{}\n{}\n{}", markdown_table(facts), markdown_table(layers),
                     markdown_table(metadata));
}

Json fired_experts(const InspectOptions& options) {
  Runtime runtime(options.run);
  Model model(options.model, runtime.context);
  Progress progress(options.run.quiet);
  std::vector<std::int32_t> ids =
      model.tokenizer->encode(options.text, models::SpecialTokens::Text);
  if (model.tokenizer->add_bos && model.tokenizer->bos) {
    ids.insert(ids.begin(), *model.tokenizer->bos);
  }
  require<InputError>(!ids.empty(), "-p: empty, expected text");
  const std::int64_t context = model.transformer.shape().context_length;
  const auto n = static_cast<std::int64_t>(ids.size());
  require<InputError>(n <= context, "-p: {} tokens, the model's context is {}", n, context);
  return usage_json(expert_usage(model, ids, progress), n);
}

void inspect(const InspectOptions& options) {
  const auto checkpoint = models::Checkpoint::load(options.model);
  Json description = describe(*checkpoint);
  std::string text = options.format == "md" ? as_tables(description) : "";
  if (options.from_text) {
    description["experts"] = fired_experts(options);
    if (options.format == "md") text += "\n" + usage_table(description["experts"]);
  }
  print(options.format == "md" ? text : to_text(description));
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* cmd =
      app.add_subcommand("inspect", "Metadata, layers, experts, bytes; which experts fire");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf), dense or hybrid")->required();
  CLI::Option* text =
      cmd->add_option("-p,--prompt", options->text, "Also show which experts fire for this text");
  add_output_option(*cmd, options->format, {"md", "json"});
  options->run.activations = "f32";
  add_run_options(*cmd, options->run);
  cmd->footer(R"(Examples:
  moesaic inspect hybrid.gguf
  moesaic inspect hybrid.gguf -p "The river Rhine rises in the Alps." -o json)");
  cmd->callback([options, text, &action] {
    options->from_text = text->count() > 0;
    action = [options] { inspect(*options); };
  });
}

}  // namespace moesaic::tools
