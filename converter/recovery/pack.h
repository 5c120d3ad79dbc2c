#pragma once

#include <optional>

#include "converter/recovery/packed.h"
#include "converter/recovery/trainer.h"
#include "engine/monitor.h"

namespace moesaic::converter {

/// Rounds the trained layers to the formats that `hybrid` holds them in, or to `type`, over up to
/// `n_windows` of the training windows, and puts what was rounded into the trainer's model. Secret
/// MoE layers first: gate, up and down rows each jointly (rounding.h), in the moments of their
/// inputs x and features f in the model as it was trained. Then self-routed ones, one after the
/// other, so that each meets the inputs that it will have (pack_self_routed.h); their shares are
/// measured anew. Attention that learnt is rounded in the same pass, each matrix in the moments of
/// the inputs that it meets there.
PackedModel pack_trained(Context& ctx, Trainer& trainer, const models::Checkpoint& hybrid,
                         std::optional<DType> type, std::int64_t n_windows,
                         engine::Monitor& monitor);

/// The self-routed layers of a trainer whose scales learnt (Learns::Scales), with the codes that
/// `hybrid` holds them in and the new scales; their thresholds and shares as pack_trained() takes
/// them. Puts them into the trainer's model. Returns them in order.
PackedLayers pack_scaled(Context& ctx, Trainer& trainer, const models::Checkpoint& hybrid,
                         std::int64_t n_windows, engine::Monitor& monitor);

}  // namespace moesaic::converter
