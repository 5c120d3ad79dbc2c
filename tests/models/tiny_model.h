#pragma once

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/quant.h"
#include "models/gguf_writer.h"
#include "models/transformer.h"
#include "tests/reference/decoder.h"

namespace moesaic::models {

/// What a tiny random checkpoint shall be.
struct TinyOptions {
  std::string architecture = "llama";
  int n_layers = 2;
  DType dtype = DType::F32;  // of the matrices
  std::int64_t window = 0;
  bool tied = true;
  std::vector<int> moe_layers = {};
  std::uint64_t seed = 1;
};

/// A small random checkpoint, in a file and as the reference's loops see it (weights exactly as the
/// file's format rounds them). The file goes with the object.
class TinyModel {
 public:
  static constexpr std::int64_t kModel = 64, kFf = 96, kVocab = 80;
  static constexpr int kHeads = 4, kKvHeads = 2;
  static constexpr std::int64_t kShared = 24, kExperts = 40, kActive = 7, kRank = 32, kBypass = 32;

  /// `change` may alter what is written: metadata and tensors by name.
  explicit TinyModel(const TinyOptions& options, const std::function<void(TinyModel&)>& change = {})
      : options_(options), rng_(options.seed) {
    const bool gemma = options.architecture == "gemma3";
    const int head_dim = gemma ? 32 : 16;
    reference.d_model = kModel;
    reference.d_ff = kFf;
    reference.vocab_size = kVocab;
    reference.n_heads = kHeads;
    reference.n_kv_heads = kKvHeads;
    reference.head_dim = head_dim;
    reference.norm_eps = 1e-5;
    reference.attention_scale = 1 / std::sqrt(head_dim);
    reference.embedding_scale = gemma ? std::sqrt(static_cast<double>(kModel)) : 1;
    reference.interleaved_rope = !gemma;
    reference.gelu = gemma;

    const std::string a = options.architecture + ".";
    set("general.architecture", GgufValue::string(options.architecture));
    set("general.name", GgufValue::string("tiny"));
    set(a + "block_count", GgufValue::u32(static_cast<std::uint32_t>(options.n_layers)));
    set(a + "context_length", GgufValue::u32(256));
    set(a + "embedding_length", GgufValue::u32(kModel));
    set(a + "feed_forward_length", GgufValue::u32(kFf));
    set(a + "attention.head_count", GgufValue::u32(kHeads));
    set(a + "attention.head_count_kv", GgufValue::u32(kKvHeads));
    set(a + "attention.layer_norm_rms_epsilon", GgufValue::f32(1e-5F));
    set(a + "rope.freq_base", GgufValue::f32(gemma ? 1e6F : 5e4F));
    if (gemma) {
      set(a + "attention.key_length", GgufValue::u32(32));
      set(a + "attention.value_length", GgufValue::u32(32));
    }
    if (options.window > 0) {
      set(a + "attention.sliding_window",
          GgufValue::u32(static_cast<std::uint32_t>(options.window)));
    }
    std::vector<std::string> pieces;
    for (std::int64_t i = 0; i < kVocab; ++i) pieces.push_back("t" + std::to_string(i));
    set("tokenizer.ggml.tokens", GgufValue::string_array(pieces));

    reference.embedding = matrix("token_embd.weight", {kVocab, kModel}, 1);
    reference.output_norm = norm("output_norm.weight", kModel);
    reference.head =
        options.tied ? reference.embedding : matrix("output.weight", {kVocab, kModel}, 0.3);
    for (int l = 0; l < options.n_layers; ++l) add_layer(l, gemma, head_dim);
    if (!options.moe_layers.empty()) add_moe_metadata();
    if (change) change(*this);

    static std::atomic<int> counter = 0;
    path = std::filesystem::temp_directory_path() /
           ("moesaic-tiny-" + std::to_string(getpid()) + "-" + std::to_string(counter++) + ".gguf");
    GgufWriter writer;
    for (const auto& [key, value] : metadata) writer.set(key, value);
    for (const Tensor& t : tensors) writer.add_tensor(t.name, t.dtype, t.dims, t.data);
    writer.write(path);
  }
  ~TinyModel() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
  TinyModel(const TinyModel&) = delete;
  TinyModel& operator=(const TinyModel&) = delete;

  std::shared_ptr<const Checkpoint> load() const { return Checkpoint::load(path); }

  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> dims;
    std::vector<std::byte> data;
  };

  void set(const std::string& key, GgufValue value) {
    for (auto& [k, v] : metadata) {
      if (k == key) {
        v = std::move(value);
        return;
      }
    }
    metadata.emplace_back(key, std::move(value));
  }
  void erase_key(const std::string& key) {
    std::erase_if(metadata, [&](const auto& entry) { return entry.first == key; });
  }
  void erase_tensor(const std::string& name) {
    std::erase_if(tensors, [&](const Tensor& t) { return t.name == name; });
  }
  Tensor& tensor(const std::string& name) {
    for (Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    throw std::out_of_range(name);
  }
  /// Adds a tensor of random values times `scale` and returns them as the file rounds them.
  std::vector<double> add(const std::string& name, DType dtype,
                          const std::vector<std::int64_t>& dims, double scale, double offset = 0) {
    std::int64_t n = 1;
    for (const std::int64_t d : dims) n *= d;
    std::normal_distribution<double> normal;
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& v : values) v = static_cast<float>(offset + scale * normal(rng_));
    Tensor t{name, dtype, dims, {}};
    t.data.resize(static_cast<std::size_t>(n / dims.back() * row_bytes(dtype, dims.back())));
    if (dtype == DType::F32) {
      std::memcpy(t.data.data(), values.data(), t.data.size());
    } else {
      const auto cols = static_cast<std::size_t>(dims.back());
      for (std::size_t r = 0; r < values.size() / cols; ++r) {
        std::byte* packed =
            t.data.data() + r * static_cast<std::size_t>(row_bytes(dtype, dims.back()));
        const std::span<float> row = std::span(values).subspan(r * cols, cols);
        kernels::quantize_row(dtype, row, packed);
        kernels::dequantize_row(dtype, packed, row);
      }
    }
    tensors.push_back(std::move(t));
    return {values.begin(), values.end()};
  }

  std::filesystem::path path;
  reference::Decoder reference;
  std::vector<std::pair<std::string, GgufValue>> metadata;
  std::vector<Tensor> tensors;

 private:
  std::vector<double> matrix(const std::string& name, const std::vector<std::int64_t>& dims,
                             double scale) {
    return add(name, options_.dtype, dims, scale);
  }
  // Scaled so that products keep the size of their input.
  std::vector<double> weight(const std::string& name, std::int64_t rows, std::int64_t cols) {
    return matrix(name, {rows, cols}, 1 / std::sqrt(static_cast<double>(cols)));
  }
  std::vector<double> norm(const std::string& name, std::int64_t n) {
    return add(name, DType::F32, {n}, 0.1, 1);
  }

  void add_layer(int l, bool gemma, int head_dim) {
    const std::string b = "blk." + std::to_string(l) + ".";
    reference::Decoder::Layer layer;
    layer.attn_norm = norm(b + "attn_norm.weight", kModel);
    layer.w_q = weight(b + "attn_q.weight", kHeads * head_dim, kModel);
    layer.w_k = weight(b + "attn_k.weight", kKvHeads * head_dim, kModel);
    layer.w_v = weight(b + "attn_v.weight", kKvHeads * head_dim, kModel);
    layer.w_o = weight(b + "attn_output.weight", kModel, kHeads * head_dim);
    layer.mlp_norm = norm(b + "ffn_norm.weight", kModel);
    if (gemma) {
      layer.q_norm = norm(b + "attn_q_norm.weight", head_dim);
      layer.k_norm = norm(b + "attn_k_norm.weight", head_dim);
      layer.post_attn_norm = norm(b + "post_attention_norm.weight", kModel);
      layer.post_mlp_norm = norm(b + "post_ffw_norm.weight", kModel);
    }
    const bool local = options_.window > 0 && (!gemma || (l + 1) % 6 != 0);
    layer.window = local ? options_.window : 0;
    layer.rope_base = gemma ? (local ? 1e4 : 1e6) : 5e4;
    bool moe = false;
    for (const int m : options_.moe_layers) moe = moe || m == l;
    if (moe) {
      add_moe(b + "moe.", layer);
    } else {
      layer.w_gate = weight(b + "ffn_gate.weight", kFf, kModel);
      layer.w_up = weight(b + "ffn_up.weight", kFf, kModel);
      layer.w_down = weight(b + "ffn_down.weight", kModel, kFf);
    }
    reference.layers.push_back(std::move(layer));
  }

  void add_moe(const std::string& b, reference::Decoder::Layer& layer) {
    const double scale = 1 / std::sqrt(static_cast<double>(kModel));
    reference::Decoder::Moe moe;
    moe.n_active = kActive;
    moe.shared = matrix(b + "shared.weight", {kShared, 3, kModel}, scale);
    moe.experts = matrix(b + "experts.weight", {kExperts, 3, kModel}, scale);
    moe.mean = add(b + "experts.mean", DType::F32, {kExperts}, 0.1);
    moe.router_v = weight(b + "router_v.weight", kRank, kModel);
    moe.router_u = weight(b + "router_u.weight", kExperts, kRank);
    moe.router_bias = add(b + "router.bias", DType::F32, {kExperts}, 0.1);
    moe.bypass_q = weight(b + "bypass_q.weight", kBypass, kModel);
    moe.bypass_p = weight(b + "bypass_p.weight", kModel, kBypass);
    moe.bias = add(b + "bias", DType::F32, {kModel}, 0.1);
    layer.moe = std::move(moe);
  }

  void add_moe_metadata() {
    std::vector<std::string> kinds(static_cast<std::size_t>(options_.n_layers), "dense");
    std::vector<std::uint64_t> active(kinds.size(), 0);
    for (const int l : options_.moe_layers) {
      kinds[static_cast<std::size_t>(l)] = "glu+low_rank";
      active[static_cast<std::size_t>(l)] = kActive;
    }
    set("moesaic.format_version", GgufValue::u32(1));
    set("moesaic.layer.kind", GgufValue::string_array(kinds));
    set("moesaic.layer.n_active", GgufValue::u32_array(active));
    for (const char* key : {"recipe", "data_digest", "source_digest", "source_file"}) {
      set(std::string("moesaic.") + key, GgufValue::string("test"));
    }
    set("moesaic.active_fraction", GgufValue::f32(0.5F));
  }

  TinyOptions options_;
  std::mt19937_64 rng_;
};

/// Threads, scratch memory and tally of one test.
struct TestContext {
  explicit TestContext(int n_threads = 2, Activations activations = Activations::F32)
      : pool(n_threads), context{pool, workspace, tally, activations} {}
  ThreadPool pool;
  Workspace workspace;
  Tally tally;
  Context context;
};

/// n ids that depend on the seed alone.
inline std::vector<std::int32_t> random_ids(std::size_t n, std::uint64_t seed = 3) {
  std::mt19937_64 rng(seed);
  std::vector<std::int32_t> ids(n);
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(rng() % TinyModel::kVocab);
  return ids;
}

}  // namespace moesaic::models
