#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "models/expert_usage.h"
#include "models/tokenizer.h"
#include "tools/output.h"

namespace moesaic::tools {

/// Experts of a layer, most fired first, the lower id on ties; at most n, only such as fired.
std::vector<std::int64_t> most_used(std::span<const std::int64_t> counts, std::size_t n);

/// {n_tokens, layers [{layer, n_experts, n_used, n_never, most_used [{expert, share}], counts,
/// never}]}: converted layers only.
Json usage_json(const models::ExpertUsage& usage);
/// One line a layer.
std::string usage_table(const models::ExpertUsage& usage);

/// The tokens that fired one expert most.
struct ExpertTokens {
  models::ExpertId id;
  double share = 0;  // of all tokens that fired it
  std::vector<models::Firing> firings;
};

/// [{layer, expert, share, tokens [{place, id, text, before, after, contribution}]}]: `before` and
/// `after` are what stands around the token within its window of n_ctx.
Json tokens_json(std::span<const ExpertTokens> experts, std::span<const std::int32_t> ids,
                 std::int64_t n_ctx, const models::Tokenizer& tokenizer);
/// One table an expert, of tokens_json().
std::string tokens_tables(const Json& tokens);

}  // namespace moesaic::tools
