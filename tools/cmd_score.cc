#include <algorithm>
#include <memory>

#include "models/evaluate.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

struct ScoreOptions {
  std::string model;
  std::string ids;
  int top = 0;
  models::ChunkOptions chunks{.n_ctx = 0, .n_chunks = -1};
  std::string format;
  RunOptions run;
};

/// nll[i] belongs to ids[i + 1]; null where that id opens a chunk and so has nothing before it.
struct Scores {
  std::vector<std::int32_t> ids;
  Json nll = Json::array();
  Json top = Json::array();
};

void append(Scores& scores, const models::TokenScores& chunk, std::int64_t offset) {
  if (offset > 0) scores.nll.push_back(nullptr);
  for (const double value : chunk.nll) scores.nll.push_back(value);
  for (const models::TokenScores::Top& top : chunk.top) {
    scores.top.push_back({{"pos", offset + top.pos}, {"ids", top.ids}, {"logprob", top.logprob}});
  }
}

std::string as_table(const Scores& scores, const models::Tokenizer& tokenizer) {
  std::vector<std::vector<std::string>> rows = {{"text", "id", "nll"}};
  for (std::size_t i = 0; i < scores.ids.size(); ++i) {
    std::string text = to_text(Json(tokenizer.piece(scores.ids[i], true)), false);
    text.pop_back();
    const bool scored = i > 0 && !scores.nll[i - 1].is_null();
    rows.push_back({text, std::to_string(scores.ids[i]),
                    scored ? fmt::format("{:.4f}", scores.nll[i - 1].get<double>()) : ""});
  }
  return markdown_table(rows);
}

void score(const ScoreOptions& options) {
  Runtime runtime(options.run);
  Model model(options.model, runtime.context, options.run.device);
  Scores scores;
  scores.ids = read_ids(options.ids, model.transformer.shape().vocab_size);
  const std::int64_t context_length = model.transformer.shape().context_length;
  const auto n_ids = static_cast<std::int64_t>(scores.ids.size());
  if (options.chunks.n_ctx == 0) {
    require<InputError>(n_ids <= context_length,
                        "{}: {} ids, the model's context is {}; --n-ctx N scores them in chunks",
                        options.ids, n_ids, context_length);
  }
  const std::int64_t n_ctx = options.chunks.n_ctx == 0 ? n_ids : options.chunks.n_ctx;
  std::int64_t n_chunks = (n_ids + n_ctx - 1) / n_ctx;
  if (options.chunks.n_chunks > 0) n_chunks = std::min(n_chunks, options.chunks.n_chunks);
  scores.ids.resize(static_cast<std::size_t>(std::min(n_ids, n_chunks * n_ctx)));

  Progress progress(options.run.quiet);
  SilentMonitor silent;
  const std::span<const std::int32_t> ids(scores.ids);
  if (n_chunks > 1) progress.stage("score", n_chunks);
  for (std::int64_t c = 0; c < n_chunks; ++c) {
    progress.check();
    const auto first = static_cast<std::size_t>(c * n_ctx);
    const auto size = std::min(static_cast<std::size_t>(n_ctx), ids.size() - first);
    engine::Monitor& monitor = n_chunks > 1 ? static_cast<engine::Monitor&>(silent) : progress;
    append(scores,
           models::score_tokens(model.transformer, ids.subspan(first, size), options.top, monitor,
                                model.on_gpu.get()),
           static_cast<std::int64_t>(first));
    if (n_chunks > 1) progress.advance(c + 1, {});
  }
  if (options.format == "json") {
    print(to_text({{"ids", scores.ids}, {"nll", scores.nll}, {"top", scores.top}}, false));
  } else {
    print(as_table(scores, *model.tokenizer));
  }
}

}  // namespace

void add_score(CLI::App& app, Action& action) {
  auto options = std::make_shared<ScoreOptions>();
  CLI::App* cmd = app.add_subcommand(
      "score", "Negative log-likelihood (natural log) of each of given token ids");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf)")->required();
  cmd->add_option("--ids", options->ids,
                  "JSON array of ids, or object with input_ids; .u32: raw little-endian uint32")
      ->required();
  cmd->add_option("--top", options->top, "Also the N most likely tokens at every position")
      ->check(integer_between(0, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--n-ctx", options->chunks.n_ctx,
                  "Score in chunks of N ids, each on its own (default: all in one sequence)")
      ->check(integer_between(2, std::int64_t{1} << 24));
  cmd->add_option("--chunks", options->chunks.n_chunks, "Chunks to score (default: all)")
      ->check(integer_between(1, std::int64_t{1} << 40));
  add_output_option(*cmd, options->format, {"json", "md"});
  options->run.activations = "f32";
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  cmd->footer(R"(No BOS is added. nll[i] belongs to ids[i+1]; null where that id opens a chunk.

Examples:
  moesaic score SmolLM2.gguf --ids ids.json --top 8
  moesaic score SmolLM2.gguf --ids wiki.test.u32 --n-ctx 512 --chunks 4 -o md)");
  cmd->callback([options, &action] { action = [options] { score(*options); }; });
}

}  // namespace moesaic::tools
