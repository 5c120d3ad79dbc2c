#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"
#include "models/config.h"
#include "models/gguf.h"
#include "models/secret_moe_file.h"

/// What the files that describe layers with experts share.
namespace moesaic::models {

// Tensor names behind "blk.N.moe.".
inline constexpr std::string_view kShared = "shared.weight";
inline constexpr std::string_view kExperts = "experts.weight";
inline constexpr std::string_view kExpertMean = "experts.mean";
inline constexpr std::string_view kRouterV = "router_v.weight";
inline constexpr std::string_view kRouterU = "router_u.weight";
inline constexpr std::string_view kRouterBias = "router.bias";
inline constexpr std::string_view kBypassQ = "bypass_q.weight";
inline constexpr std::string_view kBypassP = "bypass_p.weight";
inline constexpr std::string_view kBias = "bias";

/// "blk.N.moe.PART".
inline std::string tensor_name(int layer, std::string_view part) {
  return fmt::format("blk.{}.moe.{}", layer, part);
}

/// Checked access to one layer's tensors.
class LayerReader {
 public:
  LayerReader(const GgufFile& file, int layer) : file_(file), layer_(layer) {}

  bool has(std::string_view part) const {
    return file_.find_tensor(tensor_name(layer_, part)) != nullptr;
  }

  /// Size of the slowest dimension of a tensor that has to be there, with `rank` dimensions.
  std::int64_t leading_dim(std::string_view part, std::size_t rank) const {
    const std::string name = tensor_name(layer_, part);
    const GgufTensor* tensor = file_.find_tensor(name);
    require<FormatError>(tensor != nullptr, "{}: {} is missing", file_.path().string(), name);
    require<FormatError>(tensor->dims.size() == rank, "{}: {} is [{}], expected {} dimensions",
                         file_.path().string(), name, fmt::join(tensor->dims, ", "), rank);
    return tensor->dims[0];
  }

  /// The dimensions of a tensor that has to be there, with `rank` of them.
  std::vector<std::int64_t> dims(std::string_view part, std::size_t rank) const {
    leading_dim(part, rank);
    return file_.find_tensor(tensor_name(layer_, part))->dims;
  }

  WeightView weight(std::string_view part, std::initializer_list<std::int64_t> dims) const {
    return file_.expect(tensor_name(layer_, part), std::span(dims.begin(), dims.size())).matrix();
  }

  std::span<const float> vector(std::string_view part, std::int64_t n) const {
    return vector(part, {n});
  }

  std::span<const float> vector(std::string_view part,
                                std::initializer_list<std::int64_t> dims) const {
    const GgufTensor& tensor =
        file_.expect(tensor_name(layer_, part), std::span(dims.begin(), dims.size()));
    require<FormatError>(tensor.dtype == DType::F32, "{}: {} is of type {}, expected F32",
                         file_.path().string(), tensor.name, traits(tensor.dtype).name);
    // The reader places tensors on multiples of 8 bytes at least.
    return {reinterpret_cast<const float*>(tensor.data),
            static_cast<std::size_t>(tensor.n_elements())};
  }

 private:
  const GgufFile& file_;
  int layer_;
};

/// Entry `layer` of a per-layer metadata array, which has to have one entry per layer.
template <class T>
const T& layer_entry(const GgufFile& file, std::string_view key, const std::vector<T>& entries,
                     const ModelConfig& config, int layer) {
  require<FormatError>(entries.size() == static_cast<std::size_t>(config.n_layers),
                       "{}: metadata key {} has {} entries, expected {}, one per layer",
                       file.path().string(), key, entries.size(), config.n_layers);
  require<FormatError>(layer >= 0 && layer < config.n_layers,
                       "{}: layer {} asked for, expected 0 to {}", file.path().string(), layer,
                       config.n_layers - 1);
  return entries[static_cast<std::size_t>(layer)];
}

/// Experts of layer N that run per token: its entry of moesaic.layer.n_active.
inline std::int64_t read_n_active(const GgufFile& file, const ModelConfig& config, int layer,
                                  std::int64_t n_experts) {
  const std::vector<std::int64_t> active = file.get_ints(kKeyLayerActive);
  const std::int64_t n_active = layer_entry(file, kKeyLayerActive, active, config, layer);
  require<FormatError>(n_active >= 0 && n_active <= n_experts,
                       "{}: {} of layer {} is {}, expected 0 to {}, the number of experts",
                       file.path().string(), kKeyLayerActive, layer, n_active, n_experts);
  return n_active;
}

/// The matrix in `data`; a default view where it has no elements, as from a file without it.
inline WeightView packed_view(const AlignedBuffer<std::byte>& data, DType dtype, std::int64_t rows,
                              std::int64_t cols) {
  WeightView view;
  if (rows == 0 || cols == 0) return view;
  view.data = data.data();
  view.dtype = dtype;
  view.rows = rows;
  view.cols = cols;
  return view;
}

}  // namespace moesaic::models
