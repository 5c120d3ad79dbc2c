#include "models/config.h"

#include <cmath>
#include <limits>
#include <string_view>

#include "kernels/base/error.h"
#include "models/architecture.h"

namespace moesaic::models {
namespace {

// Metadata of one architecture ("llama.block_count"), with ranges checked.
class Reader {
 public:
  Reader(const GgufFile& file, std::string_view architecture)
      : file_(file), prefix_(std::string(architecture) + ".") {}

  std::string key(std::string_view name) const { return prefix_ + std::string(name); }
  bool has(std::string_view name) const { return file_.find(key(name)) != nullptr; }

  std::int64_t integer(std::string_view name, std::int64_t low, std::int64_t high) const {
    const std::int64_t value = file_.get_int(key(name));
    require<FormatError>(value >= low && value <= high,
                         "{}: metadata key {} is {}, expected {} to {}", file_.path().string(),
                         key(name), value, low, high);
    return value;
  }
  std::int64_t integer(std::string_view name, std::int64_t low, std::int64_t high,
                       std::int64_t fallback) const {
    return has(name) ? integer(name, low, high) : fallback;
  }
  double number(std::string_view name, double low, double high) const {
    const double value = file_.get_float(key(name));
    require<FormatError>(value >= low && value <= high,  // false for NaN
                         "{}: metadata key {} is {}, expected {} to {}", file_.path().string(),
                         key(name), value, low, high);
    return value;
  }
  double number(std::string_view name, double low, double high, double fallback) const {
    return has(name) ? number(name, low, high) : fallback;
  }

  // A feature that would change the results and that we do not compute: any value but `off` is an
  // error, so that a file never runs with silently wrong results.
  void unsupported_number(std::string_view name, double off) const {
    if (!has(name)) return;
    const GgufValue& found = *file_.find(key(name));
    const bool floating = found.type == GgufType::F32 || found.type == GgufType::F64;
    const double value =
        floating ? file_.get_float(key(name)) : static_cast<double>(file_.get_int(key(name)));
    require<FormatError>(value == off,
                         "{}: metadata key {} is {}, which is not supported (expected {} or none)",
                         file_.path().string(), key(name), value, off);
  }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

void check_unsupported(const GgufFile& file, const Reader& reader) {
  const std::string scaling = file.get_string(reader.key("rope.scaling.type"), "none");
  require<FormatError>(scaling == "none" || scaling == "linear",
                       "{}: metadata key {} is \"{}\", which is not supported (expected \"none\")",
                       file.path().string(), reader.key("rope.scaling.type"), scaling);
  reader.unsupported_number("rope.scaling.factor", 1);
  reader.unsupported_number("rope.scale_linear", 1);
  reader.unsupported_number("expert_count", 0);
  reader.unsupported_number("attn_logit_softcapping", 0);
  reader.unsupported_number("final_logit_softcapping", 0);
  reader.unsupported_number("attention.clamp_kqv", 0);
  reader.unsupported_number("attention.max_alibi_bias", 0);
  reader.unsupported_number("logit_scale", 1);
  reader.unsupported_number("residual_scale", 1);
  reader.unsupported_number("embedding_scale", 1);
  require<FormatError>(file.get_bool(reader.key("attention.causal"), true),
                       "{}: metadata key {} is false, expected a causal decoder",
                       file.path().string(), reader.key("attention.causal"));
}

// Entries of the vocabulary: as many as the tokenizer has pieces; the embedding's rows in a file
// without one.
std::int64_t read_vocab_size(const GgufFile& file, const Reader& reader) {
  const GgufTensor* embedding = file.find_tensor(kEmbeddingName);
  require<FormatError>(embedding != nullptr, "{}: {} is missing", file.path().string(),
                       kEmbeddingName);
  require<FormatError>(embedding->dims.size() == 2, "{}: {} has {} dimensions, expected 2",
                       file.path().string(), kEmbeddingName, embedding->dims.size());
  std::int64_t vocab_size = embedding->dims[0];
  constexpr std::string_view kTokens = "tokenizer.ggml.tokens";
  if (const GgufValue* tokens = file.find(kTokens)) {
    const auto* array = std::get_if<GgufArray>(&tokens->value);
    require<FormatError>(array != nullptr && array->type == GgufType::String,
                         "{}: metadata key {} is not an array of strings", file.path().string(),
                         kTokens);
    vocab_size = static_cast<std::int64_t>(std::get<std::vector<std::string>>(array->items).size());
    require<FormatError>(
        vocab_size == embedding->dims[0], "{}: {} has {} rows, expected {}, one per entry of {}",
        file.path().string(), kEmbeddingName, embedding->dims[0], vocab_size, kTokens);
  }
  require<FormatError>(vocab_size >= 1 && vocab_size <= std::numeric_limits<std::int32_t>::max(),
                       "{}: {} has {} rows, expected 1 to {}", file.path().string(), kEmbeddingName,
                       vocab_size, std::numeric_limits<std::int32_t>::max());
  const std::int64_t stated = reader.integer("vocab_size", 1, vocab_size, vocab_size);
  require<FormatError>(stated == vocab_size, "{}: metadata key {} is {}, expected {}",
                       file.path().string(), reader.key("vocab_size"), stated, vocab_size);
  return vocab_size;
}

}  // namespace

engine::DecoderShape ModelConfig::shape() const {
  return {.n_layers = n_layers,
          .n_kv_heads = n_kv_heads,
          .head_dim = head_dim,
          .vocab_size = vocab_size,
          .context_length = context_length};
}

ModelConfig read_config(const GgufFile& file) {
  const std::string path = file.path().string();
  const std::string name = file.get_string("general.architecture");
  const Architecture* architecture = find_architecture(name);
  if (architecture == nullptr) {
    std::string known;
    for (const Architecture& a : architectures()) {
      known += known.empty() ? "" : ", ";
      known += a.name;
    }
    throw FormatError(
        fmt::format("{}: architecture \"{}\" is not known, expected one of {}", path, name, known));
  }
  const Reader reader(file, name);
  check_unsupported(file, reader);

  // Bounds far above any checkpoint: products of two of them stay within 64 bits.
  constexpr std::int64_t kMaxDim = std::int64_t{1} << 24;
  ModelConfig config;
  config.architecture = name;
  config.name = file.get_string("general.name", "");
  config.n_layers = static_cast<int>(reader.integer("block_count", 1, 4096));
  config.d_model = reader.integer("embedding_length", 1, kMaxDim);
  config.d_ff = reader.integer("feed_forward_length", 1, kMaxDim);
  config.n_heads = static_cast<int>(reader.integer("attention.head_count", 1, 65536));
  config.n_kv_heads = static_cast<int>(
      reader.integer("attention.head_count_kv", 1, config.n_heads, config.n_heads));
  require<FormatError>(config.n_heads % config.n_kv_heads == 0,
                       "{}: {} attention heads over {} key/value heads, expected a multiple", path,
                       config.n_heads, config.n_kv_heads);
  if (!reader.has("attention.key_length")) {
    require<FormatError>(config.d_model % config.n_heads == 0,
                         "{}: metadata key {} is {}, expected a multiple of the {} heads", path,
                         reader.key("embedding_length"), config.d_model, config.n_heads);
  }
  config.head_dim = static_cast<int>(
      reader.integer("attention.key_length", 2, 65536, config.d_model / config.n_heads));
  require<FormatError>(config.head_dim >= 2 && config.head_dim % 2 == 0,
                       "{}: attention heads of {} elements, expected an even number", path,
                       config.head_dim);
  for (const char* same : {"attention.value_length", "rope.dimension_count"}) {
    const std::int64_t found = reader.integer(same, 0, kMaxDim, config.head_dim);
    require<FormatError>(found == config.head_dim, "{}: metadata key {} is {}, expected {}", path,
                         reader.key(same), found, config.head_dim);
  }
  config.context_length =
      reader.integer("context_length", 1, std::numeric_limits<std::int32_t>::max());
  config.norm_eps =
      static_cast<float>(reader.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0));
  config.attention_scale = static_cast<float>(
      reader.number("attention.scale", 1e-6, 1e3, 1.0 / std::sqrt(config.head_dim)));
  if (architecture->scaled_embedding) {
    config.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(config.d_model)));
  }
  config.phi = architecture->phi;
  config.rope_style = architecture->rope_style;
  config.qk_norm = !architecture->layer.q_norm.empty();
  config.post_norms = !architecture->layer.post_attn_norm.empty();
  config.vocab_size = read_vocab_size(file, reader);

  const double base = reader.number("rope.freq_base", 1.0, 1e12, architecture->rope_base);
  double base_local = architecture->rope_base_local;
  base_local = reader.number("rope.freq_base_swa", 1.0, 1e12, base_local == 0 ? base : base_local);
  const std::int64_t window =
      reader.integer("attention.sliding_window", 0, std::numeric_limits<std::uint32_t>::max(), 0);
  const std::int64_t pattern =
      reader.integer("attention.sliding_window_pattern", 1, 4096, architecture->window_pattern);
  config.layers.resize(static_cast<std::size_t>(config.n_layers));
  for (int i = 0; i < config.n_layers; ++i) {
    const bool local = window > 0 && (pattern == 1 || (i + 1) % pattern != 0);
    config.layers[static_cast<std::size_t>(i)] = {local ? base_local : base, local ? window : 0};
  }
  return config;
}

}  // namespace moesaic::models
