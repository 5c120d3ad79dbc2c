#include "tools/expert_output.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace moesaic::tools {
namespace {

constexpr std::size_t kMostUsed = 8;     // experts listed per layer
constexpr std::size_t kNeverListed = 6;  // ids in the table
constexpr std::int64_t kContext = 8;     // tokens shown on either side

std::string percent(double share) { return fmt::format("{:.3g} %", 100 * share); }

std::vector<std::int64_t> never_fired(std::span<const std::int64_t> counts) {
  std::vector<std::int64_t> ids;
  for (std::size_t e = 0; e < counts.size(); ++e) {
    if (counts[e] == 0) ids.push_back(static_cast<std::int64_t>(e));
  }
  return ids;
}

double share(const models::ExpertUsage& usage, std::int64_t count) {
  return static_cast<double>(count) / static_cast<double>(usage.n_tokens);
}

/// Text on one line of a table.
std::string on_one_line(std::string text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      out += "⏎";
    } else if (c == '|') {
      out += "∣";
    } else {
      out += c == '\t' || c == '\r' ? ' ' : c;
    }
  }
  return out;
}

}  // namespace

std::vector<std::int64_t> most_used(std::span<const std::int64_t> counts, std::size_t n) {
  std::vector<std::int64_t> order(counts.size());
  std::iota(order.begin(), order.end(), 0);
  const auto count = [&](std::int64_t e) { return counts[static_cast<std::size_t>(e)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return count(a) > count(b); });
  order.resize(std::min(n, order.size()));
  std::erase_if(order, [&](std::int64_t e) { return count(e) == 0; });
  return order;
}

Json usage_json(const models::ExpertUsage& usage) {
  Json layers = Json::array();
  for (std::size_t l = 0; l < usage.counts.size(); ++l) {
    const std::vector<std::int64_t>& counts = usage.counts[l];
    if (counts.empty()) continue;
    Json most = Json::array();
    for (const std::int64_t e : most_used(counts, kMostUsed)) {
      most.push_back({{"expert", e}, {"share", share(usage, counts[static_cast<std::size_t>(e)])}});
    }
    const std::vector<std::int64_t> never = never_fired(counts);
    layers.push_back({{"layer", l},
                      {"n_experts", counts.size()},
                      {"n_used", counts.size() - never.size()},
                      {"n_never", never.size()},
                      {"most_used", std::move(most)},
                      {"counts", counts},
                      {"never", never}});
  }
  return {{"n_tokens", usage.n_tokens}, {"layers", std::move(layers)}};
}

std::string usage_table(const models::ExpertUsage& usage) {
  std::vector<std::vector<std::string>> rows = {
      {"layer", "experts used", "median share", "most used (share of tokens)", "never fire"}};
  for (std::size_t l = 0; l < usage.counts.size(); ++l) {
    std::vector<std::int64_t> counts = usage.counts[l];
    if (counts.empty()) continue;
    std::string most;
    for (const std::int64_t e : most_used(counts, kMostUsed)) {
      most += fmt::format("{}{} ({:.0f} %)", most.empty() ? "" : ", ", e,
                          100 * share(usage, counts[static_cast<std::size_t>(e)]));
    }
    const std::vector<std::int64_t> ids = never_fired(counts);
    std::string never = std::to_string(ids.size());
    for (std::size_t i = 0; i < std::min(kNeverListed, ids.size()); ++i) {
      never += fmt::format("{}{}", i == 0 ? ": " : ", ", ids[i]);
    }
    if (ids.size() > kNeverListed) never += " …";
    const auto middle = counts.begin() + static_cast<std::ptrdiff_t>(counts.size() / 2);
    std::nth_element(counts.begin(), middle, counts.end());
    rows.push_back({std::to_string(l),
                    fmt::format("{} of {}", counts.size() - ids.size(), counts.size()),
                    percent(share(usage, *middle)), most, never});
  }
  return markdown_table(rows);
}

Json tokens_json(std::span<const ExpertTokens> experts, std::span<const std::int32_t> ids,
                 std::int64_t n_ctx, const models::Tokenizer& tokenizer) {
  const auto text = [&](std::int64_t begin, std::int64_t end) {
    std::string out;
    for (std::int64_t i = begin; i < end; ++i) {
      out += tokenizer.piece(ids[static_cast<std::size_t>(i)], true);
    }
    return out;
  };
  Json out = Json::array();
  for (const ExpertTokens& expert : experts) {
    Json tokens = Json::array();
    for (const models::Firing& firing : expert.firings) {
      const std::int64_t at = firing.place;
      const std::int64_t window = at / n_ctx * n_ctx;
      const std::int64_t end = std::min(window + n_ctx, static_cast<std::int64_t>(ids.size()));
      tokens.push_back({{"place", at},
                        {"id", ids[static_cast<std::size_t>(at)]},
                        {"text", text(at, at + 1)},
                        {"before", text(std::max(window, at - kContext), at)},
                        {"after", text(at + 1, std::min(end, at + 1 + kContext))},
                        {"contribution", firing.contribution}});
    }
    out.push_back({{"layer", expert.id.layer},
                   {"expert", expert.id.expert},
                   {"share", expert.share},
                   {"tokens", std::move(tokens)}});
  }
  return out;
}

std::string tokens_tables(const Json& tokens) {
  std::string out;
  for (const Json& expert : tokens) {
    out +=
        fmt::format("\nlayer {}, expert {}: fires for {} of the tokens\n\n", expert["layer"].dump(),
                    expert["expert"].dump(), percent(expert["share"].get<double>()));
    std::vector<std::vector<std::string>> rows = {{"in its context", "contribution"}};
    for (const Json& token : expert["tokens"]) {
      rows.push_back({on_one_line(fmt::format("{}【{}】{}", token["before"].get<std::string>(),
                                              token["text"].get<std::string>(),
                                              token["after"].get<std::string>())),
                      fmt::format("{:.3f}", token["contribution"].get<double>())});
    }
    out += rows.size() > 1 ? markdown_table(rows) : "(no token)\n";
  }
  return out;
}

}  // namespace moesaic::tools
