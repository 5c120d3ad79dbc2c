#pragma once

#include <string>

#include "models/divergence_statistics.h"
#include "tools/output.h"

namespace moesaic::tools {

/// The statistics under the keys of docs/cli.md (compare, `texts`); probabilities and shares in
/// [0, 1].
Json divergence_json(const models::DivergenceStatistics& statistics);

/// Two tables with llama-perplexity's labels: perplexities, then mean and quantiles of KLD and Δp.
/// Probabilities and shares in percent.
std::string divergence_tables(const models::DivergenceStatistics& statistics);

}  // namespace moesaic::tools
