#pragma once

#include <array>
#include <utility>
#include <variant>
#include <vector>

#include "converter/recovery/attention_block.h"
#include "models/mlp.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {

/// A converted layer in its file's formats, and the layers of a hybrid in order.
using PackedLayer = std::variant<models::PackedSecretMoe, models::PackedSelfRouted>;
using PackedLayers = std::vector<std::pair<int, PackedLayer>>;

/// The matrices of a layer's attention in its file's formats, updates merged.
struct PackedAttention {
  struct Matrix {
    DType dtype = DType::F32;
    std::int64_t rows = 0, cols = 0;
    AlignedBuffer<std::byte> bytes;

    WeightView view() const { return {bytes.data(), dtype, rows, cols, nullptr}; }
  };
  int layer = 0;
  std::array<Matrix, kAttentionMatrices> matrices;  // by AttentionMatrix
};

/// What a training changed, layers in order.
struct PackedModel {
  PackedLayers layers;
  std::vector<PackedAttention> attention;
};

/// The layer, borrowed.
inline models::Mlp view(const PackedLayer& layer) {
  return std::visit([](const auto& form) { return models::Mlp(form.view()); }, layer);
}

}  // namespace moesaic::converter
