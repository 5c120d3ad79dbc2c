#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/self_routed.h"

namespace moesaic::cuda {

/// Which matrices of a self-routed layer a GPU reads by columns (base/column_panels.h): gate and,
/// in a layer that has up_by_input, up, if both are of one format that has columns; down, if its
/// format has. The others stay in the file's rows.
bool reads_gate_by_columns(const kernels::SelfRoutedView& layer);
bool reads_up_by_columns(const kernels::SelfRoutedView& layer);
bool reads_down_by_columns(const kernels::SelfRoutedView& layer);

/// Bytes that self_routed needs as workspace.
std::size_t self_routed_workspace(const kernels::SelfRoutedView& layer);

/// y_t = self_routed(x_t) of kernels/self_routed.h, token by token, sparse: columns of the gate
/// (and of up, with up_by_input) for the large entries of x, up rows of the routed neurons, down
/// columns of the kept ones. Two launches for up to 8 tokens: one to h, one from it. A gate or down
/// without columns is multiplied as a whole, with zeros for what is below its threshold.
///
///   x, y      [n_tokens, d_model], distinct memory, rows at multiples of 16 bytes
///   workspace self_routed_workspace() bytes at a multiple of 256, zeroed before its first use and
///             given to one stream at a time; layers of one d_model may share it
///
/// All views and spans of the layer are device memory, weights at multiples of 32 bytes. What is
/// read by columns stands at gate_columns, up_parts, down_columns, and its rows are not read.
/// d_model and d_ff are multiples of 4. Deterministic: sums in an order that the shapes and the
/// entries that count give. Throws ShapeError.
void self_routed(const kernels::SelfRoutedView& layer, ConstMatrix x, Matrix y,
                 std::byte* workspace, StreamHandle stream);

/// Bytes that self_routed_batch needs as workspace for so many tokens.
std::size_t self_routed_batch_workspace(const kernels::SelfRoutedView& layer,
                                        std::int64_t n_tokens);

/// The same for batches, on tensor cores, by dense products with zeros for what is below its
/// threshold (gemm.h): each matrix is unpacked once, whichever order it stands in; x̂, x, h and
/// weights rounded to bfloat16, sums in float32. What is compared with a threshold is not rounded
/// first: x and a u in float32, and a = φ(g). But g and u are sums of rounded products, so that a
/// neuron that lies within such roundings of its threshold may be kept here and not by
/// self_routed(), or the other way round.
///
///   x, y      as above, at most 65,535 tokens
///   workspace self_routed_batch_workspace() bytes at a multiple of 256, need not be zeroed
///
/// Operands as above, thresholds at multiples of 16 bytes. Throws ShapeError, DeviceError.
void self_routed_batch(Blas& blas, const kernels::SelfRoutedView& layer, ConstMatrix x, Matrix y,
                       std::byte* workspace, StreamHandle stream);

}  // namespace moesaic::cuda
