#include "converter/assemble.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "models/gguf_writer.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {
namespace {

using models::GgufValue;

constexpr std::array<std::string_view, 3> kReplaced = {"ffn_gate", "ffn_up", "ffn_down"};

/// Name of a dense MLP tensor that conversion replaces.
std::string mlp_tensor(int layer, std::string_view part) {
  return fmt::format("blk.{}.{}.weight", layer, part);
}

/// The converted layer whose dense MLP the tensor belongs to, or nothing.
const SavedLayer* replaced_by(std::string_view tensor, std::span<const SavedLayer> layers) {
  for (const SavedLayer& layer : layers) {
    if (!layer.mlp) continue;
    for (const std::string_view part : kReplaced) {
      if (tensor == mlp_tensor(layer.report.layer, part)) return &layer;
    }
  }
  return nullptr;
}

void check_layers(const models::GgufFile& dense, std::span<const SavedLayer> layers) {
  const std::string path = dense.path().string();
  const std::int64_t n_layers =
      dense.get_int(dense.get_string("general.architecture") + ".block_count");
  require<InputError>(static_cast<std::int64_t>(layers.size()) == n_layers,
                      "{}: {} layers to assemble, expected {}", path, layers.size(), n_layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerReport& r = layers[i].report;
    require<InputError>(r.layer == static_cast<int>(i), "{}: layer {} at place {}, expected {}",
                        path, r.layer, i, i);
    const bool converted = r.kind != models::kKindDense;
    require<InputError>(converted == layers[i].mlp.has_value(),
                        "{}: layer {} is of kind {} but {} expert tensors", path, i, r.kind,
                        converted ? "has no" : "has");
    if (!converted) continue;
    for (const std::string_view part : kReplaced) {
      require<FormatError>(dense.find_tensor(mlp_tensor(r.layer, part)) != nullptr,
                           "{}: {} is missing", path, mlp_tensor(r.layer, part));
    }
  }
}

/// One value per layer as an array.
template <class T, class Get>
std::vector<T> per_layer(std::span<const LayerReport> layers, Get get) {
  std::vector<T> values;
  for (const LayerReport& layer : layers) values.push_back(static_cast<T>(get(layer)));
  return values;
}

void add_tensor(models::GgufWriter& writer, const models::GgufTensor& t) {
  writer.add_tensor(t.name, t.dtype, t.dims, {t.data, static_cast<std::size_t>(t.bytes)});
}

}  // namespace

void set_hybrid_metadata(models::GgufWriter& writer, const models::GgufFile& dense,
                         std::span<const LayerReport> layers, const ConvertOptions& options,
                         const ConvertReport& report) {
  for (const auto& [key, value] : dense.metadata()) writer.set(key, value);
  const std::string source = dense.path().filename().string();
  writer.set("general.name",
             GgufValue::string(dense.get_string("general.name", dense.path().stem().string()) +
                               " (secret MoE hybrid)"));

  const auto set = [&](std::string_view key, GgufValue value) {
    writer.set(std::string(key), std::move(value));
  };
  const auto counts = [&](std::string_view key, auto get) {
    set(key, GgufValue::u32_array(per_layer<std::uint64_t>(layers, get)));
  };
  const auto figures = [&](std::string_view key, auto get) {
    set(key, GgufValue::f32_array(per_layer<double>(layers, get)));
  };
  set(models::kKeyFormatVersion, GgufValue::u32(models::kSecretMoeFormatVersion));
  set(models::kKeyLayerKind, GgufValue::string_array(per_layer<std::string>(
                                 layers, [](const LayerReport& r) { return r.kind; })));
  counts(models::kKeyLayerActive, [](const LayerReport& r) { return r.n_active; });
  counts("moesaic.layer.n_shared", [](const LayerReport& r) { return r.n_shared; });
  counts("moesaic.layer.n_experts", [](const LayerReport& r) { return r.n_experts; });
  counts("moesaic.layer.router_rank", [](const LayerReport& r) { return r.router_rank; });
  counts("moesaic.layer.bypass_rank", [](const LayerReport& r) { return r.bypass_rank; });
  if (std::any_of(layers.begin(), layers.end(), is_self_routed)) {
    figures(models::kKeyInputShare, [](const LayerReport& r) { return r.shares.input; });
    figures(models::kKeyGateShare, [](const LayerReport& r) { return r.shares.gate; });
    figures(models::kKeyHiddenShare, [](const LayerReport& r) { return r.shares.hidden; });
  }
  figures("moesaic.layer.active_fraction", [](const LayerReport& r) { return r.active_fraction; });
  figures("moesaic.layer.sensitivity", [](const LayerReport& r) { return r.sensitivity; });
  figures("moesaic.layer.error_closed_form",
          [](const LayerReport& r) { return r.error_closed_form; });
  figures("moesaic.layer.error_distilled", [](const LayerReport& r) { return r.error_distilled; });
  set(models::kKeyRecipe, GgufValue::string(options.recipe));
  set(models::kKeyDataDigest, GgufValue::string(report.data_digest));
  set(models::kKeySourceDigest, GgufValue::string(report.source_digest));
  set(models::kKeySourceFile, GgufValue::string(source));
  set(models::kKeyActiveFraction, GgufValue::f32(static_cast<float>(report.active_fraction)));
  set("moesaic.active_target", GgufValue::f32(static_cast<float>(options.active)));
  set("moesaic.calibration_tokens", GgufValue::u64(static_cast<std::uint64_t>(report.n_tokens)));
  set("moesaic.seed", GgufValue::u64(options.seed));
}

void assemble(const models::GgufFile& dense, std::span<const SavedLayer> layers,
              const ConvertOptions& options, const ConvertReport& report,
              const std::filesystem::path& output) {
  check_layers(dense, layers);
  models::GgufWriter writer;
  std::vector<LayerReport> reports;
  for (const SavedLayer& layer : layers) reports.push_back(layer.report);
  set_hybrid_metadata(writer, dense, reports, options, report);
  std::vector<bool> written(layers.size(), false);
  for (const models::GgufTensor& tensor : dense.tensors()) {
    const SavedLayer* layer = replaced_by(tensor.name, layers);
    if (layer == nullptr) {
      add_tensor(writer, tensor);
      continue;
    }
    // The layer's own tensors stand where the first of the three stood.
    const auto index = static_cast<std::size_t>(layer->report.layer);
    if (written[index]) continue;
    written[index] = true;
    for (const models::GgufTensor& t : layer->file->tensors()) add_tensor(writer, t);
  }
  writer.write(output);
}

std::int64_t estimate_output_bytes(const models::GgufFile& dense, std::optional<DType> expert_dtype,
                                   std::optional<DType> router_dtype, std::int64_t more_neurons) {
  const std::int64_t n_layers =
      dense.get_int(dense.get_string("general.architecture") + ".block_count");
  const DType router = router_dtype.value_or(DType::BF16);
  // Bits per weight, so that a row that is no whole number of blocks counts in part.
  const auto bytes_of = [](DType dtype, std::int64_t n) {
    const DTypeTraits& t = traits(dtype);
    return (n + t.block_elems - 1) / t.block_elems * t.block_bytes;
  };
  std::int64_t bytes = dense.file_bytes() + (std::int64_t{1} << 16);  // metadata and padding
  for (int layer = 0; layer < n_layers; ++layer) {
    std::int64_t d_model = 0;
    std::int64_t d_ff = 0;
    DType gate = DType::BF16;
    for (const std::string_view part : kReplaced) {
      const models::GgufTensor* t = dense.find_tensor(mlp_tensor(layer, part));
      if (t == nullptr || t->dims.size() != 2) continue;
      d_model = std::min(t->dims[0], t->dims[1]);
      d_ff = std::max(t->dims[0], t->dims[1]) + more_neurons;
      // Experts take the format of ffn_gate, the first of the three, where that can be written,
      // else BF16 at most.
      if (part == kReplaced[0]) gate = kernels::can_quantize(t->dtype) ? t->dtype : DType::BF16;
      const std::int64_t experts = bytes_of(expert_dtype.value_or(gate), d_model * d_ff);
      bytes += std::max<std::int64_t>(0, experts - t->bytes);
    }
    const std::int64_t rank = d_model / 4;
    bytes += bytes_of(router, rank * (d_model + d_ff)) + bytes_of(router, 2 * rank * d_model);
    bytes += static_cast<std::int64_t>(sizeof(float)) * (2 * d_ff + d_model) + 4096;
  }
  return bytes;
}

}  // namespace moesaic::converter
