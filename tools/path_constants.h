#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "kernels/base/context.h"
#include "kernels/secret_moe.h"
#include "models/transformer.h"
#include "tools/output.h"

namespace moesaic::tools {

/// The layers with packed weights among those of a checkpoint.
std::vector<kernels::SecretMoeView> packed_layers(const Context& ctx,
                                                  const models::Checkpoint& checkpoint);

/// Times the paths of these layers one after the other, as a pass of the model would, with random
/// inputs, and solves for the constants: gather with one token; grouped with 4 and 32; masked with
/// 2 (what it takes at least) and 64. The fastest of eight passes each; half a second for
/// SmolLM2-135M. `layers` not empty.
kernels::PathConstants measure_path_constants(Context& ctx,
                                              const std::vector<kernels::SecretMoeView>& layers);

/// The constants by name, as in the file and in `moesaic bench --costs -o json`.
Json to_json(const kernels::PathConstants& constants);

/// ${MOESAIC_CACHE:-~/.cache/moesaic}/path-constants.json: constants by processor, threads, format
/// of the experts and d_model.
std::filesystem::path path_constants_file();

/// Puts constants into the file for layers like these; others' entries stay. A file that cannot be
/// written is left: the next run measures again.
void store_path_constants(const Context& ctx, const std::vector<kernels::SecretMoeView>& layers,
                          const kernels::PathConstants& constants);

/// The checkpoint with the constants of this machine in its layers: from the file, or measured and
/// put there. A checkpoint whose experts fit in a cache keeps the defaults, which a measurement in
/// microseconds would not better, and so does one without packed layers.
std::shared_ptr<const models::Checkpoint> with_path_constants(
    Context& ctx, std::shared_ptr<const models::Checkpoint> checkpoint);

}  // namespace moesaic::tools
