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

kernels::SelfRoutedView PackedSelfRouted::view() const {
  const auto matrix = [](const AlignedBuffer<std::byte>& data, DType dtype, std::int64_t rows,
                         std::int64_t cols) {
    WeightView w;
    w.data = data.data();
    w.dtype = dtype;
    w.rows = rows;
    w.cols = cols;
    return w;
  };
  kernels::SelfRoutedView view;
  view.phi = phi;
  view.up_by_input = up_by_input;
  view.w_gate = matrix(w_gate, gate_dtype, d_ff, d_model);
  view.w_up = matrix(w_up, up_dtype, d_ff, d_model);
  view.w_down = matrix(w_down, down_dtype, d_model, d_ff);
  view.input_threshold = input_threshold.span();
  view.gate_threshold = gate_threshold.span();
  view.hidden_threshold = hidden_threshold.span();
  view.input_share = input_share;
  view.gate_share = gate_share;
  view.hidden_share = hidden_share;
  return view;
}

std::vector<PackedSelfRouted::Tensor> PackedSelfRouted::tensors(const LayerTensorNames& names,
                                                                int layer) const {
  std::vector<Tensor> all;
  const auto add = [&](std::string_view part, DType dtype, std::vector<std::int64_t> dims,
                       std::span<const std::byte> data) {
    all.push_back({fmt::format("blk.{}.{}", layer, part), dtype, std::move(dims), data});
  };
  add(names.w_gate, gate_dtype, {d_ff, d_model}, w_gate.span());
  add(names.w_up, up_dtype, {d_ff, d_model}, w_up.span());
  add(names.w_down, down_dtype, {d_model, d_ff}, w_down.span());
  add(kInputThreshold, DType::F32, {d_model}, std::as_bytes(input_threshold.span()));
  if (!up_by_input) {
    add(kGateThreshold, DType::F32, {d_ff}, std::as_bytes(gate_threshold.span()));
  }
  add(kHiddenThreshold, DType::F32, {d_ff}, std::as_bytes(hidden_threshold.span()));
  return all;
}

}  // namespace moesaic::models
