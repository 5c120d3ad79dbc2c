#pragma once

#include "engine/throughput.h"
#include "models/transformer.h"

namespace moesaic::tools {

/// FLOP per token that the model asks for, mean over the work's tokens:
///   2 · (multiply-adds of the weight matrices that the token passes)
///   + 4 · n_heads · head_dim · (keys that it attends to)   in each layer.
/// A hybrid's MLP counts with the neurons that are active (models::multiply_adds), the head where
/// logits are computed, and in the last layer a token without logits only its key and value. Norms,
/// softmax and sampling do not count, nor what a kernel computes beyond what it must.
double flops_per_token(const models::Checkpoint& checkpoint, const engine::Work& work);

}  // namespace moesaic::tools
