#include "converter/layerwise.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "kernels/quant.h"
#include "models/expert_usage.h"

namespace moesaic::converter {

bool converts(const ConvertOptions& options, int layer) {
  const std::vector<int>& wanted = options.layers;
  return wanted.empty() || std::find(wanted.begin(), wanted.end(), layer) != wanted.end();
}

void check_layerwise(const ConvertOptions& options, const models::ModelConfig& config) {
  require<InputError>(options.plan.empty() && options.curves.empty(),
                      "--{}: the recipe \"{}\" makes no use of a plan",
                      options.plan.empty() ? "curves" : "plan", options.recipe);
  for (const int layer : options.layers) {
    require<InputError>(layer >= 0 && layer < config.n_layers,
                        "--layers: {} given, the checkpoint has layers 0 to {}", layer,
                        config.n_layers - 1);
  }
}

DType format_for(std::string_view flag, std::optional<DType> wanted, DType own,
                 std::initializer_list<std::int64_t> lengths) {
  const auto fits = [&](DType t) {
    return kernels::can_quantize(t) && std::all_of(lengths.begin(), lengths.end(), [&](auto n) {
             return n % traits(t).block_elems == 0;
           });
  };
  if (wanted) {
    require<InputError>(fits(*wanted), "{}: {} cannot hold rows of {} weights", flag,
                        traits(*wanted).name, fmt::join(lengths, " and "));
    return *wanted;
  }
  if (fits(own)) return own;
  return fits(DType::Q8_0) ? DType::Q8_0 : DType::BF16;
}

std::vector<SavedLayer> kept_layers(const StateFolder& state, const models::ModelConfig& config) {
  std::vector<SavedLayer> kept;
  while (static_cast<int>(kept.size()) < config.n_layers) {
    auto layer = state.load_layer(static_cast<int>(kept.size()), config);
    if (!layer) break;
    kept.push_back(std::move(*layer));
  }
  return kept;
}

void run_counted(Context& ctx, const models::Mlp& layer, ConstMatrix x, Matrix y,
                 std::vector<float>& usage) {
  constexpr std::int64_t kTile = 2048;
  const std::int64_t k = models::n_selected(layer);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(models::n_experts(layer)));
  std::vector<std::int32_t> selected(static_cast<std::size_t>(std::min(kTile, x.rows) * k));
  for (std::int64_t first = 0; first < x.rows; first += kTile) {
    const std::int64_t rows = std::min(kTile, x.rows - first);
    const auto ids = std::span(selected).first(static_cast<std::size_t>(rows * k));
    models::mlp_forward(ctx, layer, {.x = x.slice(first, rows)}, y.slice(first, rows), ids);
    for (const std::int32_t id : ids) ++counts[static_cast<std::size_t>(id)];
  }
  usage.clear();
  for (const std::int64_t c : counts) {
    usage.push_back(static_cast<float>(c) / static_cast<float>(x.rows));
  }
}

}  // namespace moesaic::converter
