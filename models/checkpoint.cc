#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/base/error.h"
#include "models/architecture.h"
#include "models/mixture_file.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"
#include "models/transformer.h"

namespace moesaic::models {
namespace {

// A weight matrix [rows, cols], its rows made of whole blocks.
WeightView read_matrix(const GgufFile& file, std::string_view name, std::int64_t rows,
                       std::int64_t cols) {
  const std::array dims = {rows, cols};
  const GgufTensor& tensor = file.expect(name, dims);
  const DTypeTraits& format = traits(tensor.dtype);
  require<FormatError>(cols % format.block_elems == 0,
                       "{}: {} is {} with rows of {}, expected a multiple of {}",
                       file.path().string(), name, format.name, cols, format.block_elems);
  // Unquantised rows are read element by element.
  const std::uintptr_t alignment = tensor.dtype == DType::F32 ? 4 : 1;
  require<FormatError>(reinterpret_cast<std::uintptr_t>(tensor.data) % alignment == 0,
                       "{}: {} does not begin at a multiple of {} bytes", file.path().string(),
                       name, alignment);
  return tensor.matrix();
}

// A norm's weights: F32 and finite.
std::span<const float> read_vector(const GgufFile& file, std::string_view name, std::int64_t n) {
  const std::array dims = {n};
  const GgufTensor& tensor = file.expect(name, dims);
  require<FormatError>(tensor.dtype == DType::F32, "{}: {} is {}, expected F32",
                       file.path().string(), name, traits(tensor.dtype).name);
  require<FormatError>(reinterpret_cast<std::uintptr_t>(tensor.data) % alignof(float) == 0,
                       "{}: {} does not begin at a multiple of {} bytes", file.path().string(),
                       name, alignof(float));
  const std::span<const float> values(reinterpret_cast<const float*>(tensor.data),
                                      static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < values.size(); ++i) {
    require<FormatError>(std::isfinite(values[i]), "{}: {}[{}] is {}, expected a finite number",
                         file.path().string(), name, i, values[i]);
  }
  return values;
}

// Tensors that change what a layer computes, in ways that we do not: better no result than a wrong
// one. Other extra tensors are left alone.
void refuse_unsupported(const GgufFile& file, const LayerTensorNames& names) {
  const std::array known = {names.q_norm, names.k_norm, names.post_attn_norm, names.post_mlp_norm};
  constexpr std::array<std::string_view, 7> kFeatures = {
      "attn_q_norm.weight", "attn_k_norm.weight",   "post_attention_norm.weight",
      "attn_qkv.weight",    "post_ffw_norm.weight", "attn_sub_norm.weight",
      "attn_sinks.weight"};
  for (const GgufTensor& tensor : file.tensors()) {
    const std::string_view name = tensor.name;
    bool refused = name.starts_with("rope_freqs.") || name.starts_with("rope_factors_") ||
                   name == "output.bias" || name == "output_norm.bias";
    if (name.starts_with("blk.")) {
      const std::size_t dot = name.find('.', 4);
      const std::string_view part =
          dot == std::string_view::npos ? std::string_view{} : name.substr(dot + 1);
      if (part.starts_with("moe.")) continue;
      refused = part.ends_with(".bias") || part.find("_exps.") != std::string_view::npos ||
                part.starts_with("ffn_gate_inp.") || part.starts_with("rope_");
      for (const std::string_view feature : kFeatures) refused = refused || part == feature;
      for (const std::string_view ours : known) refused = refused && part != ours;
    }
    require<FormatError>(!refused, "{}: {} is a part that architecture {} is not expected to have",
                         file.path().string(), name, file.get_string("general.architecture"));
  }
}

LayerWeights read_layer(const GgufFile& file, const ModelConfig& config,
                        const LayerTensorNames& names, int layer) {
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  const auto matrix = [&](std::string_view name, std::int64_t rows, std::int64_t cols) {
    return read_matrix(file, prefix + std::string(name), rows, cols);
  };
  const auto vector = [&](std::string_view name, std::int64_t n) {
    return name.empty() ? std::span<const float>{}
                        : read_vector(file, prefix + std::string(name), n);
  };
  const std::int64_t q_rows = std::int64_t{config.n_heads} * config.head_dim;
  const std::int64_t kv_rows = std::int64_t{config.n_kv_heads} * config.head_dim;
  LayerWeights weights;
  weights.attn_norm = vector(names.attn_norm, config.d_model);
  weights.w_q = matrix(names.w_q, q_rows, config.d_model);
  weights.w_k = matrix(names.w_k, kv_rows, config.d_model);
  weights.w_v = matrix(names.w_v, kv_rows, config.d_model);
  weights.w_o = matrix(names.w_o, config.d_model, q_rows);
  weights.q_norm = vector(names.q_norm, config.head_dim);
  weights.k_norm = vector(names.k_norm, config.head_dim);
  weights.post_attn_norm = vector(names.post_attn_norm, config.d_model);
  weights.mlp_norm = vector(names.mlp_norm, config.d_model);
  weights.post_mlp_norm = vector(names.post_mlp_norm, config.d_model);
  if (auto moe = read_secret_moe(file, config, layer)) {
    weights.mlp = *moe;
  } else if (const auto mixture = read_mixture(file, config, layer)) {
    weights.mlp = *mixture;
  } else {
    const DenseMlp dense{config.phi, matrix(names.w_gate, config.d_ff, config.d_model),
                         matrix(names.w_up, config.d_ff, config.d_model),
                         matrix(names.w_down, config.d_model, config.d_ff)};
    if (const auto routed = read_self_routed(file, config, layer, dense)) {
      weights.mlp = *routed;
    } else {
      weights.mlp = dense;
    }
  }
  return weights;
}

}  // namespace

std::shared_ptr<const Checkpoint> Checkpoint::load(const std::filesystem::path& path) {
  auto checkpoint = std::make_shared<Checkpoint>();
  checkpoint->file = GgufFile::open(path);
  const GgufFile& file = *checkpoint->file;
  checkpoint->config = read_config(file);
  const ModelConfig& config = checkpoint->config;
  const LayerTensorNames& names = find_architecture(config.architecture)->layer;
  refuse_unsupported(file, names);

  checkpoint->embedding = read_matrix(file, kEmbeddingName, config.vocab_size, config.d_model);
  checkpoint->output_norm = read_vector(file, kOutputNormName, config.d_model);
  checkpoint->head = file.find_tensor(kHeadName) != nullptr
                         ? read_matrix(file, kHeadName, config.vocab_size, config.d_model)
                         : checkpoint->embedding;
  checkpoint->layers.reserve(config.layers.size());
  for (int layer = 0; layer < config.n_layers; ++layer) {
    checkpoint->layers.push_back(read_layer(file, config, names, layer));
  }
  return checkpoint;
}

double Checkpoint::active_fraction() const {
  const double dense = 3.0 * static_cast<double>(config.d_model) * static_cast<double>(config.d_ff);
  double sum = 0;
  for (const LayerWeights& layer : layers) {
    sum += static_cast<double>(multiply_adds(layer.mlp)) / dense;
  }
  return sum / static_cast<double>(layers.size());
}

}  // namespace moesaic::models
