#pragma once

#include <memory>

#include "kernels/base/thread_pool.h"
#include "models/transformer.h"

namespace moesaic::models {

/// The same checkpoint with a copy of its matrices in panels (kernels/panels.h), for
/// Activations::Q16; matrices in formats without panels stay as they are. Takes about as much
/// memory again as the file's matrices, for secret-MoE layers in four bits 2.7 times as much
/// (single neurons and a dense form), for self-routed layers twice as much (panels for batches,
/// columns and rows for single tokens), and lets go of what was read of the file's mapping. The
/// original's views stay valid. Throws IoError if the memory is refused.
std::shared_ptr<const Checkpoint> with_panels(const Checkpoint& checkpoint, ThreadPool& pool);

}  // namespace moesaic::models
