#pragma once

#include <span>
#include <vector>

#include "converter/recovery/trainer.h"
#include "engine/monitor.h"
#include "models/secret_moe_file.h"

namespace moesaic::converter {

/// Rounds the trained layers to the formats that `hybrid` holds them in: gate, up and down rows
/// each jointly (rounding.h), in the moments of their inputs x and features f over up to
/// `n_windows` of the training windows. Returns the converted layers in order.
std::vector<std::pair<int, models::PackedSecretMoe>> pack_trained(Context& ctx, Trainer& trainer,
                                                                  const models::Checkpoint& hybrid,
                                                                  std::int64_t n_windows,
                                                                  engine::Monitor& monitor);

}  // namespace moesaic::converter
