#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "converter/allot.h"
#include "converter/recipe.h"
#include "converter/stream.h"
#include "engine/monitor.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// What each layer costs the model when it alone is converted (closed form) by `plan`: mean KL
/// divergence from the dense model's next-token distribution, in nats, over sampled positions of
/// windows that the fit has not seen. Step 6 of the recipe. `tokens` [n_windows · n_ctx]; the last
/// sixth of the windows judges, the others fit. Layers that are not `wanted` [n_layers] get 0.
std::vector<double> measure_sensitivity(Passes& passes, std::span<const std::int32_t> tokens,
                                        std::int64_t n_ctx, const LayerPlan& plan,
                                        const std::vector<bool>& wanted, const Recipe& recipe,
                                        engine::Monitor& monitor);

/// ω of a layer per token (DESIGN.md section 2, step 1): 1 / ‖r after the layer‖²; where a norm
/// follows the MLP, over mean(y²) too, since that is what the norm divides the error by. Scaled to
/// mean 1. r the stream before the MLP, y its output [n_tokens, d_model].
std::vector<float> token_weights(models::Transformer& model, int layer, ConstMatrix r,
                                 ConstMatrix y);

}  // namespace moesaic::converter
