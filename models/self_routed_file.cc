#include "models/self_routed_file.h"

#include <array>
#include <cmath>

#include "kernels/base/error.h"
#include "models/secret_moe_file.h"

namespace moesaic::models {
namespace {

std::span<const float> read_thresholds(const GgufFile& file, int layer, std::string_view part,
                                       std::int64_t n) {
  const std::string name = fmt::format("blk.{}.{}", layer, part);
  const std::array dims = {n};
  const GgufTensor& tensor = file.expect(name, dims);
  require<FormatError>(tensor.dtype == DType::F32, "{}: {} is of type {}, expected F32",
                       file.path().string(), name, traits(tensor.dtype).name);
  // The reader places tensors on multiples of 8 bytes at least.
  const std::span<const float> values(reinterpret_cast<const float*>(tensor.data),
                                      static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < values.size(); ++i) {
    require<FormatError>(values[i] >= 0, "{}: {}[{}] is {}, expected 0 or more",
                         file.path().string(), name, i, values[i]);
  }
  return values;
}

float read_share(const GgufFile& file, const ModelConfig& config, int layer, std::string_view key) {
  const std::vector<double> shares = file.get_floats(key);
  require<FormatError>(shares.size() == static_cast<std::size_t>(config.n_layers),
                       "{}: metadata key {} has {} entries, expected {}, one per layer",
                       file.path().string(), key, shares.size(), config.n_layers);
  const double share = shares[static_cast<std::size_t>(layer)];
  require<FormatError>(share >= 0 && share <= 1, "{}: {} of layer {} is {}, expected 0 to 1",
                       file.path().string(), key, layer, share);
  return static_cast<float>(share);
}

}  // namespace

std::optional<kernels::SelfRoutedView> read_self_routed(const GgufFile& file,
                                                        const ModelConfig& config, int layer,
                                                        const DenseMlp& dense) {
  const std::string kind = layer_kind(file, config, layer);
  if (kind != kKindGluGate && kind != kKindGluInput) return std::nullopt;
  kernels::SelfRoutedView view;
  view.phi = dense.phi;
  view.up_by_input = kind == kKindGluInput;
  view.w_gate = dense.w_gate;
  view.w_up = dense.w_up;
  view.w_down = dense.w_down;
  view.input_threshold = read_thresholds(file, layer, kInputThreshold, config.d_model);
  if (!view.up_by_input) {
    view.gate_threshold = read_thresholds(file, layer, kGateThreshold, config.d_ff);
  }
  view.hidden_threshold = read_thresholds(file, layer, kHiddenThreshold, config.d_ff);
  view.input_share = read_share(file, config, layer, kKeyInputShare);
  view.gate_share = read_share(file, config, layer, kKeyGateShare);
  view.hidden_share = read_share(file, config, layer, kKeyHiddenShare);
  return view;
}

}  // namespace moesaic::models
