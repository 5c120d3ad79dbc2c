#pragma once

#include <utility>
#include <variant>
#include <vector>

#include "models/mlp.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {

/// A converted layer in its file's formats, and the layers of a hybrid in order.
using PackedLayer = std::variant<models::PackedSecretMoe, models::PackedSelfRouted>;
using PackedLayers = std::vector<std::pair<int, PackedLayer>>;

/// The layer, borrowed.
inline models::Mlp view(const PackedLayer& layer) {
  return std::visit([](const auto& form) { return models::Mlp(form.view()); }, layer);
}

}  // namespace moesaic::converter
