#include "tools/path_constants.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <random>
#include <variant>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"
#include "models/gguf_writer.h"
#include "tools/machine_limits.h"

namespace moesaic::tools {
namespace {

using kernels::MoePath;
using kernels::PathConstants;
using Layers = std::vector<kernels::SecretMoeView>;

constexpr std::int64_t kLeastBytes = std::int64_t{16} << 20;  // of experts worth a measurement
constexpr int kPasses = 8;
constexpr std::int64_t kMostTokens = 64;

struct Field {
  const char* name;
  double PathConstants::*value;
};
constexpr Field kFields[] = {{"gather", &PathConstants::gather},
                             {"grouped", &PathConstants::grouped},
                             {"grouped_read", &PathConstants::grouped_read},
                             {"masked", &PathConstants::masked},
                             {"masked_least", &PathConstants::masked_least}};

/// Random rows for all layers, and the ns of the fastest pass through them: with another process
/// on one of the cores, threads that wait for each other take ten times as long, and that is not
/// what is to be kept.
class Passes {
 public:
  Passes(Context& ctx, const Layers& layers)
      : ctx_(ctx),
        layers_(layers),
        d_model_(layers.front().d_model()),
        x_(static_cast<std::size_t>(kMostTokens * d_model_)),
        y_(x_.size()) {
    std::mt19937_64 rng(0);
    std::normal_distribution<float> normal;
    for (float& v : x_.span()) v = normal(rng);
  }

  double nanoseconds(MoePath path, std::int64_t n_tokens) {
    double least = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
      const auto start = std::chrono::steady_clock::now();
      for (const kernels::SecretMoeView& layer : layers_) {
        kernels::secret_moe(ctx_, layer, ConstMatrix(x_.data(), n_tokens, d_model_),
                            Matrix(y_.data(), n_tokens, d_model_), path);
      }
      const std::chrono::duration<double, std::nano> taken =
          std::chrono::steady_clock::now() - start;
      if (pass == 0 || taken.count() < least) least = taken.count();
    }
    return least;
  }

 private:
  Context& ctx_;
  const Layers& layers_;
  std::int64_t d_model_;
  AlignedBuffer<float> x_, y_;  // [kMostTokens, d_model]
};

/// Σ over layers of fn(layer) · d_model.
template <class Fn>
double columns_of(const Layers& layers, Fn&& fn) {
  double sum = 0;
  for (const kernels::SecretMoeView& layer : layers) {
    sum += static_cast<double>(fn(layer)) * static_cast<double>(layer.d_model());
  }
  return sum;
}

std::string key_of(const Context& ctx, const Layers& layers) {
  return fmt::format("{}, {} threads, {}, d_model {}", cpu_name(), ctx.pool.n_threads(),
                     traits(layers.front().experts.dtype).name, layers.front().d_model());
}

/// The file's object, or an empty one if there is none that can be read.
Json read_file(const std::filesystem::path& path) {
  std::ifstream file(path);
  Json all = Json::parse(file, nullptr, false);
  return all.is_object() ? all : Json::object();
}

/// False unless every field is there, finite and not negative.
bool read_constants(const Json& entry, PathConstants& to) {
  if (!entry.is_object()) return false;
  for (const Field& field : kFields) {
    const auto value = entry.find(field.name);
    if (value == entry.end() || !value->is_number()) return false;
    to.*field.value = value->get<double>();
    if (!std::isfinite(to.*field.value) || to.*field.value < 0) return false;
  }
  return true;
}

}  // namespace

std::vector<kernels::SecretMoeView> packed_layers(const Context& ctx,
                                                  const models::Checkpoint& checkpoint) {
  Layers layers;
  for (const models::LayerWeights& layer : checkpoint.layers) {
    const auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp);
    if (moe != nullptr && kernels::uses_packed(ctx, *moe)) layers.push_back(*moe);
  }
  return layers;
}

PathConstants measure_path_constants(Context& ctx, const Layers& layers) {
  Passes passes(ctx, layers);
  // At least 1, so that layers without neurons divide by something.
  const auto columns = [&](auto&& fn) { return std::max(1.0, columns_of(layers, fn)); };
  const double active =
      columns([](const auto& layer) { return layer.n_shared() + layer.n_active; });
  const double all =
      columns([](const auto& layer) { return layer.n_shared() + layer.n_experts(); });
  const auto distinct = [&](std::int64_t n_tokens) {
    return columns(
        [n_tokens](const auto& layer) { return kernels::distinct_neurons(layer, n_tokens); });
  };

  PathConstants c;
  c.gather = passes.nanoseconds(MoePath::Gather, 1) / active;
  // few = 4 g A + r D(4), many = 32 g A + r D(32)
  const double few = passes.nanoseconds(MoePath::Grouped, 4);
  const double many = passes.nanoseconds(MoePath::Grouped, 32);
  c.grouped_read = std::max(0.0, (8 * few - many) / (8 * distinct(4) - distinct(32)));
  c.grouped = std::max(0.0, (many - c.grouped_read * distinct(32)) / (32 * active));
  c.masked_least = passes.nanoseconds(MoePath::Masked, 2) / all;
  c.masked = passes.nanoseconds(MoePath::Masked, kMostTokens) / (kMostTokens * all);
  return c;
}

Json to_json(const PathConstants& constants) {
  Json entry;
  for (const Field& field : kFields) entry[field.name] = constants.*field.value;
  return entry;
}

std::filesystem::path path_constants_file() {
  constexpr const char* kName = "path-constants.json";
  if (const char* cache = std::getenv("MOESAIC_CACHE"); cache != nullptr && *cache != '\0') {
    return std::filesystem::path(cache) / kName;
  }
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home != nullptr ? home : "/tmp") / ".cache/moesaic" / kName;
}

void store_path_constants(const Context& ctx, const Layers& layers,
                          const PathConstants& constants) {
  const std::filesystem::path path = path_constants_file();
  Json all = read_file(path);
  all[key_of(ctx, layers)] = to_json(constants);
  std::error_code ignored;
  std::filesystem::create_directories(path.parent_path(), ignored);
  try {
    models::write_file_atomically(path, to_text(all));
  } catch (const IoError&) {
    // A read-only home is no reason to fail.
  }
}

std::shared_ptr<const models::Checkpoint> with_path_constants(
    Context& ctx, std::shared_ptr<const models::Checkpoint> checkpoint) {
  const Layers layers = packed_layers(ctx, *checkpoint);
  std::int64_t bytes = 0;
  for (const kernels::SecretMoeView& layer : layers) bytes += layer.experts.bytes();
  if (bytes < kLeastBytes) return checkpoint;

  PathConstants constants;
  if (!read_constants(read_file(path_constants_file()).value(key_of(ctx, layers), Json()),
                      constants)) {
    constants = measure_path_constants(ctx, layers);
    ctx.tally.reset();
    store_path_constants(ctx, layers, constants);
  }
  auto result = std::make_shared<models::Checkpoint>(*checkpoint);
  for (models::LayerWeights& layer : result->layers) {
    auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp);
    if (moe != nullptr) moe->costs = constants;
  }
  return result;
}

}  // namespace moesaic::tools
