#pragma once

#include "kernels/cuda/attention.h"

namespace moesaic::cuda {

/// kernels::attention for batches of many tokens, on tensor cores: blocks of 64 tokens and a head,
/// their keys a tile at a time with a running maximum and sum. Queries, keys, values and weights
/// are rounded to bfloat16, sums and the softmax are float32. A block goes over the keys of each
/// sequence that has tokens in it: tokens of one sequence should stand together, in any order. q,
/// out [n_tokens, n_heads · head_dim], rows at multiples of 16 bytes; head_dim a multiple of 4 up
/// to 256. shape.max_positions is not read. A row's result depends on its own keys alone, but for a
/// NaN or infinity among those that its block reads. Throws ShapeError. Source: Dao 2023,
/// "FlashAttention-2".
void prompt_attention(ConstMatrix q, const TokenPlaces& places, const PagedKv& cache,
                      const AttentionShape& shape, Matrix out, StreamHandle stream);

}  // namespace moesaic::cuda
