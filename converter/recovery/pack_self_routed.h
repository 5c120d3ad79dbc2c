#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <optional>
#include <span>

#include "converter/linalg.h"
#include "converter/recovery/converted.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {

/// The types of a layer's gate, up and down matrix.
using MatrixTypes = std::array<DType, SelfRoutedParameters<float>::kTensors>;

/// Packs matrix `m` (SelfRoutedParameters::kNames) and puts what the bytes hold in the place of
/// `w`; `moments()` is the Cholesky factor of its inputs' second moments.
using PackMatrix = std::function<AlignedBuffer<std::byte>(std::size_t m, Matrix w,
                                                          const std::function<DMatrix()>& moments)>;

/// A trained layer in the formats that it will be written in, given its inputs x [n, d_model] on
/// text and their weights ω [n]. Gate and up are packed given the moments of x̂ and x, W_down given
/// those of h; what is packed first is what the next part is measured with. Each threshold vector
/// is taken times the factor at which its share of (token, entry) pairs is the layer's target,
/// exactly. The shares are left as the targets.
models::PackedSelfRouted pack_self_routed(Context& ctx, const TrainedSelfRouted<Bfloat16>& layer,
                                          const MatrixTypes& types, const PackMatrix& pack,
                                          ConstMatrix x, std::span<const float> weight);

/// Packs by rounding rows jointly (rounding.h). The context is borrowed.
PackMatrix by_rounding(Context& ctx, const MatrixTypes& types);

/// The types that the layer's matrices have; and those to write them in, `wanted` or, where they
/// can be written, their own (writable_type).
MatrixTypes types_of(const kernels::SelfRoutedView& layer);
MatrixTypes writable_types(const kernels::SelfRoutedView& layer, std::optional<DType> wanted);

/// The factor f >= 0 at which |v_ti| >= f θ_i holds for `share` of all entries, or for the next
/// smaller share that there is; 1 where so many hold at every factor, since θ_i = 0. v is
/// overwritten.   v [n, θ.size()]
float factor_for_share(Context& ctx, Matrix v, std::span<const float> threshold, double share);

}  // namespace moesaic::converter
