#pragma once

#include <memory>
#include <optional>
#include <string>

#include "converter/device.h"
#include "engine/decoder.h"
#include "models/transformer.h"

namespace moesaic::tools {

/// GPU number of "cuda" or "cuda:N"; nothing for any other text.
std::optional<int> cuda_device(const std::string& device);

/// True if this program was built with the CUDA backend.
bool built_with_cuda();

/// The checkpoint on that GPU. Throws DeviceError: built without CUDA, no driver, no such GPU, out
/// of memory.
std::unique_ptr<engine::Decoder> make_cuda_decoder(
    std::shared_ptr<const models::Checkpoint> checkpoint, int device);

/// What conversions and trainings have done on the GPU of "cuda" or "cuda:N"; empty for any other
/// text. Throws DeviceError as above: before there is anything to do.
converter::ConverterDevice make_converter_device(const std::string& device);

}  // namespace moesaic::tools
