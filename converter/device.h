#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "converter/device_distillation.h"
#include "converter/recovery/options.h"
#include "converter/stream.h"
#include "engine/decoder.h"
#include "kernels/products.h"

namespace moesaic::converter {

/// Makes passes of a dense checkpoint on another device, for windows of n_ctx tokens; the model is
/// borrowed.
using MakeDevicePasses =
    std::function<std::unique_ptr<Passes>(models::Transformer& model, std::int64_t n_ctx)>;
using MakeProducts = std::function<std::unique_ptr<kernels::Products>()>;

/// Makes a decoder of a checkpoint there.
using MakeDecoder =
    std::function<std::unique_ptr<engine::Decoder>(std::shared_ptr<const models::Checkpoint>)>;

/// What a conversion has done on another device; what is empty is done on the CPU.
struct ConverterDevice {
  MakeDecoder decoder;                  // text that the model samples itself
  MakeDeviceTraining training;          // recovery
  MakeDevicePasses passes;              // calibration, measured losses
  MakeProducts products;                // of the fits
  MakeDeviceDistillation distillation;  // of layers behind low-rank routers
};

}  // namespace moesaic::converter
