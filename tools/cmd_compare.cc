#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>

#include "engine/throughput.h"
#include "models/evaluate.h"
#include "models/gguf_writer.h"
#include "models/secret_moe_file.h"
#include "tools/commands.h"
#include "tools/divergence_output.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/resident.h"
#include "tools/session.h"
#include "tools/statistics.h"

namespace moesaic::tools {
namespace {

// pp512 and tg128, or as much as the context holds.
constexpr std::int64_t kPrefill = 512;
constexpr std::int64_t kDecode = 128;
constexpr std::int64_t kBatch = 512;  // tokens per prefill pass

struct CompareOptions {
  std::string dense, hybrid;
  std::vector<std::string> data;  // the first: in-domain; the others: out of domain
  models::ChunkOptions chunks;
  int repetitions = 5;
  std::string format;
  std::string json_file;
  RunOptions run;
};

/// Everything measured about one of the two models.
struct Side {
  std::string path;
  std::string recipe;                     // that made the file; empty where it says none
  models::Perplexity quality;             // of the first text
  std::vector<double> prefill, decode;    // tokens/s, one per repetition
  std::optional<double> bytes_per_token;  // of decode; the CPU's kernels alone count them
  double active_fraction = 1;
  std::int64_t file_bytes = 0;
  std::int64_t resident_bytes = 0;

  std::int64_t n_prefill = 0, n_decode = 0;  // tokens of each measurement

  double prefill_tps() const { return median(prefill); }
  double decode_tps() const { return median(decode); }
};

/// One text: how far the hybrid strays from the dense model on it.
struct TextResult {
  std::string data;
  models::Divergence divergence;

  double ratio() const { return divergence.statistics.perplexity_ratio.value; }
};

/// Tokens of every text. Throws InputError for one that does not fill a chunk: now, and not when
/// its turn comes.
std::vector<std::vector<std::int32_t>> read_texts(const CompareOptions& options,
                                                  const models::Tokenizer& tokenizer) {
  std::vector<std::vector<std::int32_t>> texts;
  for (const std::string& path : options.data) {
    texts.push_back(read_data(path, tokenizer));
    const auto n = static_cast<std::int64_t>(texts.back().size());
    const std::int64_t expected = options.chunks.n_ctx - (tokenizer.add_bos ? 1 : 0);
    require<InputError>(n >= expected, "{}: {} tokens, expected at least {}, one chunk", path, n,
                        expected);
  }
  return texts;
}

/// Largest perplexity ratio of an out-of-domain text over the in-domain ratio.
double out_of_domain(const std::vector<TextResult>& texts) {
  double largest = 0;
  for (std::size_t i = 1; i < texts.size(); ++i) largest = std::max(largest, texts[i].ratio());
  return largest / texts[0].ratio();
}

/// The two models in turn within each repetition, and the order turned from one repetition to the
/// next: what the machine does beside this weighs on both alike.
void measure_throughput(Model& dense, Model& hybrid, Side (&sides)[2],
                        const CompareOptions& options, Runtime& runtime, Progress& progress) {
  Model* models[2] = {&dense, &hybrid};
  SilentMonitor silent;
  const std::int64_t context = dense.transformer.shape().context_length;
  const std::int64_t n_prefill = std::min(kPrefill, context);
  const std::int64_t n_decode = std::min(kDecode, context);
  for (Side& side : sides) {
    side.n_prefill = n_prefill;
    side.n_decode = n_decode;
  }
  progress.stage("throughput", std::int64_t{4} * options.repetitions);
  for (int r = 0; r < options.repetitions; ++r) {
    for (int i = 0; i < 2; ++i) {
      const int which = (i + r) % 2;
      sides[which].prefill.push_back(engine::measure_prefill(models[which]->decoder(),
                                                             runtime.tally, n_prefill, kBatch, 1,
                                                             silent)
                                         .mean);
      progress.advance(4 * r + i + 1, {});
      progress.check();
    }
    for (int i = 0; i < 2; ++i) {
      const int which = (i + r) % 2;
      const engine::Throughput t =
          engine::measure_decode(models[which]->decoder(), runtime.tally, n_decode, 1, silent);
      sides[which].decode.push_back(t.mean);
      if (models[which]->on_gpu == nullptr) {
        std::optional<double>& bytes = sides[which].bytes_per_token;
        bytes = bytes.value_or(0) + t.bytes_per_token / options.repetitions;
      }
      progress.advance(4 * r + 2 + i + 1, {});
      progress.check();
    }
  }
}

/// The number, or null for none.
Json known(const std::optional<double>& value) { return value ? Json(*value) : Json(); }

Json as_json(const Side& side) {
  Json json = {{"model", side.path},
               {"perplexity", side.quality.perplexity},
               {"perplexity_stderr", side.quality.perplexity_stderr},
               {"prefill_tps", side.prefill_tps()},
               {"prefill_tps_stddev", sample_stddev(side.prefill)},
               {"decode_tps", side.decode_tps()},
               {"decode_tps_stddev", sample_stddev(side.decode)},
               {"bytes_per_token", known(side.bytes_per_token)},
               {"active_fraction", side.active_fraction},
               {"file_bytes", side.file_bytes},
               {"resident_bytes", side.resident_bytes}};
  if (!side.recipe.empty()) json["recipe"] = side.recipe;
  return json;
}

Json as_json(const TextResult& text) {
  const auto perplexity = [](const models::Perplexity& p) -> Json {
    return {{"perplexity", p.perplexity}, {"perplexity_stderr", p.perplexity_stderr}};
  };
  Json json = {{"data", text.data},
               {"n_chunks", text.divergence.dense.n_chunks},
               {"n_tokens_scored", text.divergence.dense.n_tokens_scored},
               {"active_fraction", known(text.divergence.active_fraction)},
               {"dense", perplexity(text.divergence.dense)},
               {"hybrid", perplexity(text.divergence.hybrid)}};
  json.update(divergence_json(text.divergence.statistics));
  return json;
}

Json as_json(const Side (&sides)[2], const std::vector<TextResult>& texts,
             const CompareOptions& options) {
  const models::Divergence& first = texts[0].divergence;
  Json json = {{"dense", as_json(sides[0])},
               {"hybrid", as_json(sides[1])},
               {"kl_mean", first.statistics.kl.value},
               {"kl_stderr", first.statistics.kl.stderror},
               {"top1_agreement", first.statistics.same_top.value},
               {"n_chunks", first.dense.n_chunks},
               {"n_ctx", first.dense.n_ctx},
               {"n_tokens_scored", first.dense.n_tokens_scored},
               {"device", options.run.device},
               {"n_threads", options.run.threads},
               {"activations", options.run.activations},
               {"repetitions", options.repetitions},
               {"texts", Json::array()}};
  for (const TextResult& text : texts) json["texts"].push_back(as_json(text));
  if (texts.size() > 1) json["out_of_domain"] = out_of_domain(texts);
  return json;
}

std::string file_name(const std::string& path) {
  return std::filesystem::path(path).filename().string();
}

/// One block a text, and how the out-of-domain ratios compare with the in-domain one.
std::string text_blocks(const std::vector<TextResult>& texts) {
  const bool several = texts.size() > 1;
  std::string out;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const models::Perplexity& dense = texts[i].divergence.dense;
    const std::optional<double>& active = texts[i].divergence.active_fraction;
    out +=
        fmt::format("\n{}{}: {} chunks of {} tokens ({} scored){}\n\n{}", file_name(texts[i].data),
                    !several ? ""
                    : i == 0 ? " (in-domain)"
                             : " (out of domain)",
                    dense.n_chunks, dense.n_ctx, dense.n_tokens_scored,
                    active ? fmt::format(", {:.3f} of the MLPs active", *active) : "",
                    divergence_tables(texts[i].divergence.statistics));
  }
  if (!several) return out;
  out += fmt::format("\nperplexity ratio {:.3f} in-domain; out of domain", texts[0].ratio());
  for (std::size_t i = 1; i < texts.size(); ++i) {
    out += fmt::format("{} {:.3f} ({}), {:.3f} times that", i == 1 ? "" : ";", texts[i].ratio(),
                       file_name(texts[i].data), texts[i].ratio() / texts[0].ratio());
  }
  return out + "\n";
}

std::string as_table(const Side (&sides)[2], const std::vector<TextResult>& texts,
                     const CompareOptions& options) {
  const models::Divergence& divergence = texts[0].divergence;
  const Side& dense = sides[0];
  const Side& hybrid = sides[1];
  const auto ratio = [](double h, double d) { return fmt::format("{:.3f}", h / d); };
  const auto perplexity = [](const Side& s) {
    return fmt::format("{:.3f} ± {:.3f}", s.quality.perplexity, s.quality.perplexity_stderr);
  };
  const auto speed = [](double middle, const std::vector<double>& samples) {
    return fmt::format("{:.1f} ± {:.1f}", middle, sample_stddev(samples));
  };
  const auto megabytes = [](double bytes) { return fmt::format("{:.2f} MB", bytes / 1e6); };
  const auto size = [](std::int64_t bytes) { return format_bytes(static_cast<double>(bytes)); };
  const auto number = [](std::int64_t n) { return static_cast<double>(n); };
  std::vector<std::string> bytes_read = {"bytes read per decoded token", "–", "–", ""};
  if (dense.bytes_per_token && hybrid.bytes_per_token) {
    bytes_read = {bytes_read[0], megabytes(*dense.bytes_per_token),
                  megabytes(*hybrid.bytes_per_token),
                  ratio(*hybrid.bytes_per_token, *dense.bytes_per_token)};
  }
  const std::string where =
      options.run.device == "cpu"
          ? fmt::format("{} threads, {} activations", options.run.threads, options.run.activations)
          : options.run.device;
  const std::string table = markdown_table(
      {{"", "dense", "hybrid", "hybrid / dense"},
       {"perplexity", perplexity(dense), perplexity(hybrid),
        ratio(hybrid.quality.perplexity, dense.quality.perplexity)},
       {"KL divergence from dense (nats)", "0",
        fmt::format("{:.4f} ± {:.4f}", divergence.statistics.kl.value,
                    divergence.statistics.kl.stderror),
        ""},
       {"top-1 agreement with dense", "100 %",
        fmt::format("{:.1f} %", 100 * divergence.statistics.same_top.value), ""},
       {fmt::format("prefill, pp{} (tokens/s)", dense.n_prefill),
        speed(dense.prefill_tps(), dense.prefill), speed(hybrid.prefill_tps(), hybrid.prefill),
        ratio(hybrid.prefill_tps(), dense.prefill_tps())},
       {fmt::format("decode, tg{} (tokens/s)", dense.n_decode),
        speed(dense.decode_tps(), dense.decode), speed(hybrid.decode_tps(), hybrid.decode),
        ratio(hybrid.decode_tps(), dense.decode_tps())},
       bytes_read,
       {"active fraction of the MLPs", fmt::format("{:.3f}", dense.active_fraction),
        fmt::format("{:.3f}", hybrid.active_fraction),
        ratio(hybrid.active_fraction, dense.active_fraction)},
       {"file size", size(dense.file_bytes), size(hybrid.file_bytes),
        ratio(number(hybrid.file_bytes), number(dense.file_bytes))},
       {"resident memory", size(dense.resident_bytes), size(hybrid.resident_bytes),
        ratio(number(hybrid.resident_bytes), number(dense.resident_bytes))}});
  return fmt::format(
      "{}\n{} chunks of {} tokens ({} scored), {}; tokens/s: median ± "
      "standard deviation of {} repetitions, the two models in turn.\n{}",
      table, divergence.dense.n_chunks, divergence.dense.n_ctx, divergence.dense.n_tokens_scored,
      where, options.repetitions, text_blocks(texts));
}

void compare(const CompareOptions& options) {
  Side sides[2];
  sides[0].path = options.dense;
  sides[1].path = options.hybrid;
  if (!options.json_file.empty()) models::check_writable(options.json_file, 1 << 16);
  // Opened once for the errors that opening tells; closed again, and no thread started, before the
  // children that measure resident memory are forked.
  for (const Side& side : sides) models::Checkpoint::load(side.path);
  Progress progress(options.run.quiet);
  progress.stage("resident memory", 2);
  for (int i = 0; i < 2; ++i) {
    sides[i].resident_bytes = measure_resident_bytes(sides[i].path, options.run);
    progress.advance(i + 1, {});
  }

  Runtime runtime(options.run);
  Model dense(options.dense, runtime.context, options.run.device);
  Model hybrid(options.hybrid, runtime.context, options.run.device);
  warn_beyond_context(dense, options.chunks.n_ctx, progress);
  const std::vector<std::vector<std::int32_t>> tokens = read_texts(options, *dense.tokenizer);
  std::vector<TextResult> texts;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    texts.push_back(
        {options.data[i], models::evaluate_divergence(
                              dense.transformer, hybrid.transformer, *dense.tokenizer, tokens[i],
                              options.chunks, progress, dense.on_gpu.get(), hybrid.on_gpu.get())});
  }
  sides[0].quality = texts[0].divergence.dense;
  sides[1].quality = texts[0].divergence.hybrid;
  measure_throughput(dense, hybrid, sides, options, runtime, progress);
  for (int i = 0; i < 2; ++i) {
    const Model& model = i == 0 ? dense : hybrid;
    sides[i].active_fraction = model.checkpoint->active_fraction();
    sides[i].file_bytes = model.checkpoint->file->file_bytes();
    if (models::is_hybrid(*model.checkpoint->file)) {
      sides[i].recipe = model.checkpoint->file->get_string(models::kKeyRecipe, "");
    }
  }
  if (!options.json_file.empty()) {
    models::write_file_atomically(options.json_file, to_text(as_json(sides, texts, options)));
  }
  print(options.format == "json" ? to_text(as_json(sides, texts, options))
                                 : as_table(sides, texts, options));
}

}  // namespace

void add_compare(CLI::App& app, Action& action) {
  auto options = std::make_shared<CompareOptions>();
  CLI::App* cmd =
      app.add_subcommand("compare", "Dense and hybrid side by side: quality, speed, bytes");
  cmd->add_option("DENSE", options->dense, "Dense checkpoint (.gguf)")->required();
  cmd->add_option("HYBRID", options->hybrid, "Hybrid made from it (.gguf)")->required();
  cmd->add_option("--data", options->data,
                  "Text file; .u32: token ids, raw little-endian uint32. Again: more texts, out of "
                  "the first one's domain")
      ->required()
      ->allow_extra_args(false);
  add_chunk_options(*cmd, options->chunks);
  cmd->add_option("-r,--repetitions", options->repetitions, "Throughput measurements of each model")
      ->check(integer_between(1, 1000))
      ->capture_default_str();
  add_output_option(*cmd, options->format, {"md", "json"});
  cmd->add_option("--json-file", options->json_file, "Also write the JSON to this file");
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  cmd->footer(
      R"(Bytes per token are counted by the kernels while decoding. Resident memory is that of a process
of its own that loaded one model, prefilled 512 tokens and decoded 32. On CUDA it is the host's, and
nobody counts bytes.

The first text should be of the domain that the hybrid was calibrated on. tools/fetch-prose gets one
that WikiText is not, the Jargon File, and prints its path. `moesaic report` draws what --json-file
leaves in files named *.compare.json.

Examples:
  moesaic compare SmolLM2.gguf hybrid.gguf --data wiki.test.raw --chunks 40
  moesaic compare SmolLM2.gguf hybrid.gguf --data wiki.test.raw --data $(tools/fetch-prose)
  moesaic compare SmolLM2.gguf hybrid.gguf --data wiki.test.raw --json-file runs/a.compare.json
  moesaic compare SmolLM2.gguf hybrid.gguf --data wiki.test.raw -o json > table.json)");
  cmd->callback([options, &action] { action = [options] { compare(*options); }; });
}

}  // namespace moesaic::tools
