#pragma once

#include <cstdint>

#include "converter/device.h"

namespace moesaic::converter {

/// Rows that layers see at a time, unless a window is longer: products at full speed, and 16 · d_ff
/// bytes a row of memory.
inline constexpr std::int64_t kPassRows = 2048;

/// Passes on GPU `device`: streams stay in its memory, attention, norms, dense MLPs, self-routed
/// ones around the same matrices, head and divergences run there, operands of products in bfloat16
/// with float32 sums in cuBLAS, as with Activations::BF16 in the model's context. Other MLPs run in
/// that context, on the host. Layers are queued and not waited for; what is waited for are copies
/// from and to the host, and a divergence. The weights are copied once, in bfloat16, NaN and
/// infinity as they are; nothing is allocated but there and for each stream. Deterministic. Making
/// them throws DeviceError, InputError for a checkpoint that is not dense.
MakeDevicePasses cuda_passes(int device, std::int64_t rows = kPassRows);

}  // namespace moesaic::converter
