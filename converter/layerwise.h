#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "converter/job.h"
#include "converter/state.h"
#include "kernels/base/context.h"
#include "models/mlp.h"

/// What conversions that go layer by layer share.
namespace moesaic::converter {

/// Whether --layers asks for this layer.
bool converts(const ConvertOptions& options, int layer);

/// Throws InputError where --layers names one that the checkpoint lacks, or where --plan or
/// --curves are given: recipes with a router make no use of them.
void check_layerwise(const ConvertOptions& options, const models::ModelConfig& config);

/// The format of rows of all these lengths: `wanted` as given for `flag`, else `own` where rows are
/// whole blocks of it and it can be written, else Q8_0, else BF16. Throws InputError where `wanted`
/// cannot hold them.
DType format_for(std::string_view flag, std::optional<DType> wanted, DType own,
                 std::initializer_list<std::int64_t> lengths);

/// The layers that an earlier run finished, from the first on.
std::vector<SavedLayer> kept_layers(const StateFolder& state, const models::ModelConfig& config);

/// y = layer(x) tile by tile, of a layer with a router; `usage` [n_experts] becomes the share of
/// rows that select each expert.
void run_counted(Context& ctx, const models::Mlp& layer, ConstMatrix x, Matrix y,
                 std::vector<float>& usage);

}  // namespace moesaic::converter
