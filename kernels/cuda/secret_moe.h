#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/secret_moe.h"

namespace moesaic::cuda {

/// Bytes that secret_moe_token needs as workspace.
std::size_t secret_moe_token_workspace(const kernels::SecretMoeView& layer);

/// y = secret_moe(x) of kernels/secret_moe.h for one token, fused: router and bypass inwards (one
/// launch); scores, bypass outwards and top-k (one); gather and activation of the shared and
/// selected neurons, then, behind a grid barrier, the sum of their down rows and all else (one). A
/// launch more where the router's and the bypass's dtypes, or the shared neurons' and the experts',
/// differ.
///
///   x, y      [1, d_model], distinct memory; d_model a multiple of 4
///   selected  [n_active], receives the chosen ids, ascending
///   workspace secret_moe_token_workspace() bytes at a multiple of 256, zeroed before its first use
///             and given to one stream at a time
///
/// All views and spans of the layer are device memory, weights at multiples of 32 bytes. Reads
/// router, bypass, shared and selected neurons once. Deterministic: sums in an order that the
/// shapes alone give. Throws ShapeError.
void secret_moe_token(const kernels::SecretMoeView& layer, ConstMatrix x, Matrix y,
                      std::int32_t* selected, std::byte* workspace, StreamHandle stream);

}  // namespace moesaic::cuda
