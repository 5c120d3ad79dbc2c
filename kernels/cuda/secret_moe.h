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

/// Bytes that secret_moe_batch needs as workspace for so many tokens.
std::size_t secret_moe_batch_workspace(const kernels::SecretMoeView& layer, std::int64_t n_tokens);

/// The path that Auto takes for a batch: Grouped unless 16 neighbouring experts, a tile, are wanted
/// by nearly every token, were they chosen at random.
kernels::MoePath choose_secret_moe_path(const kernels::SecretMoeView& layer);

/// The same for batches, on tensor cores: x, weights and activations h rounded to bfloat16, sums in
/// float32; the router and the bypass in float32, so that tokens select what they select alone.
/// Masked: all neurons for all tokens, what was not chosen set to zero. Grouped: for each 16
/// experts the tokens that chose any of them, in order; the down rows by a product of all neurons
/// with the zeros between. Launches do not depend on what is chosen.
///
///   x, y      [n_tokens, d_model], distinct memory; rows at multiples of 16 bytes
///   selected  [n_tokens, n_active], receives the chosen ids, ascending per token
///   workspace secret_moe_batch_workspace() bytes, otherwise as secret_moe_token's; not the same
///
/// Deterministic, without floating-point atomics. Throws ShapeError, also for MoePath::Gather.
void secret_moe_batch(const kernels::SecretMoeView& layer, ConstMatrix x, Matrix y,
                      std::int32_t* selected, std::byte* workspace, StreamHandle stream,
                      kernels::MoePath path = kernels::MoePath::Auto);

}  // namespace moesaic::cuda
