#include <fmt/format.h>

#include <memory>

#include "models/evaluate.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

struct EvalOptions {
  std::string model;
  std::string data;
  models::ChunkOptions chunks;
  std::string format;
  RunOptions run;
};

void evaluate(const EvalOptions& options) {
  Runtime runtime(options.run);
  Model model(options.model, runtime.context, options.run.device);
  Progress progress(options.run.quiet);
  warn_beyond_context(model, options.chunks.n_ctx, progress);
  const std::vector<std::int32_t> tokens = read_data(options.data, *model.tokenizer);
  const models::Perplexity result = models::evaluate_perplexity(
      model.transformer, *model.tokenizer, tokens, options.chunks, progress, model.on_gpu.get());
  if (options.format == "json") {
    print(to_text({{"perplexity", result.perplexity},
                   {"perplexity_stderr", result.perplexity_stderr},
                   {"n_chunks", result.n_chunks},
                   {"n_ctx", result.n_ctx},
                   {"n_tokens_scored", result.n_tokens_scored},
                   {"tokens_per_second", result.tokens_per_second}}));
    return;
  }
  print(markdown_table(
      {{"model", "perplexity", "chunks", "n_ctx", "tokens scored", "tokens/s"},
       {std::filesystem::path(options.model).filename().string(),
        fmt::format("{:.4f} ± {:.4f}", result.perplexity, result.perplexity_stderr),
        std::to_string(result.n_chunks), std::to_string(result.n_ctx),
        std::to_string(result.n_tokens_scored), fmt::format("{:.1f}", result.tokens_per_second)}}));
}

}  // namespace

void add_eval(CLI::App& app, Action& action) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* cmd =
      app.add_subcommand("eval", "Perplexity of a text, counted as llama-perplexity does");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf), dense or hybrid")->required();
  cmd->add_option("--data", options->data, "Text file; .u32: token ids, raw little-endian uint32")
      ->required();
  add_chunk_options(*cmd, options->chunks);
  add_output_option(*cmd, options->format, {"md", "json"});
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  cmd->footer(
      R"(Non-overlapping chunks, the second half of each scored, BOS in front where the model wants it.

Examples:
  moesaic eval SmolLM2.gguf --data wiki.test.raw --chunks 20
  moesaic eval hybrid.gguf --data wiki.test.raw -o json)");
  cmd->callback([options, &action] { action = [options] { evaluate(*options); }; });
}

}  // namespace moesaic::tools
