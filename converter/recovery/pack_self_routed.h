#pragma once

#include <optional>
#include <span>

#include "converter/recovery/converted.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {

/// A trained layer in the formats that it will be written in, given its inputs x [n, d_model] on
/// text and their weights ω [n]. Gate and up rows are rounded jointly (rounding.h) in the moments
/// of x̂ and x, rows of W_down in those of h; what is rounded first is what the next part is
/// measured with. Each threshold vector is taken times the factor at which its share of (token,
/// entry) pairs is the layer's target, exactly. The shares are left as the targets. A matrix keeps
/// its type in `before` where that can be written (writable_type).
models::PackedSelfRouted pack_self_routed(Context& ctx, const TrainedSelfRouted<Bfloat16>& layer,
                                          const kernels::SelfRoutedView& before,
                                          std::optional<DType> type, ConstMatrix x,
                                          std::span<const float> weight);

/// What to write rows of `cols` weights in that stand in a file as `own`: `wanted` if there is one,
/// own if it can be written, else Q8_0, else BF16. Throws InputError if `wanted` cannot hold them.
DType writable_type(DType own, std::optional<DType> wanted, std::int64_t cols);

/// The factor f >= 0 at which |v_ti| >= f θ_i holds for `share` of all entries, or for the next
/// smaller share that there is; 1 where so many hold at every factor, since θ_i = 0. v is
/// overwritten.   v [n, θ.size()]
float factor_for_share(Context& ctx, Matrix v, std::span<const float> threshold, double share);

}  // namespace moesaic::converter
