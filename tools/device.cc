#include "tools/device.h"

#include <charconv>

#include "kernels/base/error.h"
#if MOESAIC_HAS_CUDA
#include "converter/cuda/distillation.h"
#include "converter/cuda/passes.h"
#include "converter/recovery/cuda/training.h"
#include "kernels/cuda/base/device.h"
#include "kernels/cuda/base/products.h"
#include "models/cuda/transformer.h"
#endif

namespace moesaic::tools {

std::optional<int> cuda_device(const std::string& device) {
  constexpr std::string_view kName = "cuda";
  if (device == kName) return 0;
  if (!device.starts_with("cuda:")) return std::nullopt;
  int index = 0;
  const char* begin = device.data() + kName.size() + 1;
  const char* end = device.data() + device.size();
  const auto [stop, error] = std::from_chars(begin, end, index);
  if (error != std::errc() || stop != end || index < 0) return std::nullopt;
  return index;
}

#if MOESAIC_HAS_CUDA

bool built_with_cuda() { return true; }

std::unique_ptr<engine::Decoder> make_cuda_decoder(
    std::shared_ptr<const models::Checkpoint> checkpoint, int device) {
  return std::make_unique<models::CudaTransformer>(std::move(checkpoint), device);
}

converter::ConverterDevice make_converter_device(const std::string& device) {
  const auto gpu = cuda_device(device);
  if (!gpu) return {};
  cuda::use_device(*gpu);
  return {.decoder =
              [gpu = *gpu](std::shared_ptr<const models::Checkpoint> checkpoint) {
                return make_cuda_decoder(std::move(checkpoint), gpu);
              },
          .training = converter::cuda_training(*gpu),
          .passes = converter::cuda_passes(*gpu),
          .products = [gpu = *gpu] { return cuda::make_products(gpu); },
          .distillation = converter::cuda_distillation(*gpu)};
}

#else

bool built_with_cuda() { return false; }

std::unique_ptr<engine::Decoder> make_cuda_decoder(std::shared_ptr<const models::Checkpoint>,
                                                   int device) {
  throw DeviceError(fmt::format("cuda:{}: built without CUDA", device));
}

converter::ConverterDevice make_converter_device(const std::string& device) {
  if (cuda_device(device)) throw DeviceError(fmt::format("{}: built without CUDA", device));
  return {};
}

#endif

}  // namespace moesaic::tools
