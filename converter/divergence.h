#pragma once

#include "models/transformer.h"

namespace moesaic::converter {

/// Mean KL divergence, nats, between the next-token distributions that two final residual streams
/// lead to, over every fourth position (neighbours say much the same).   dense, other [n_tokens,
/// d_model]. Throws FormatError if the logits are NaN or infinite.
double mean_divergence(models::Transformer& model, ConstMatrix dense, ConstMatrix other);

}  // namespace moesaic::converter
