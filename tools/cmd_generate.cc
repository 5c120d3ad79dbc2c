#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "engine/generation.h"
#include "tools/batch_file.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"
#include "tools/stop.h"

namespace moesaic::tools {
namespace {

struct GenerateOptions {
  std::string model;
  std::string prompt;
  std::string batch;
  bool from_batch = false;
  bool chat = false;
  bool special = false;
  bool ignore_eos = false;
  int parallel = 8;
  PromptOptions prompt_options;
  std::string format;
  RunOptions run;
};

/// Ids of a prompt, BOS in front where the model wants it; an empty one is BOS alone.
std::vector<std::int32_t> encode_prompt(const GenerateOptions& options, const Model& model,
                                        const BatchItem& item) {
  if (!item.messages.empty() || options.chat) {
    const auto messages = item.messages.empty()
                              ? std::vector<models::ChatMessage>{{"user", item.prompt}}
                              : item.messages;
    return models::encode_chat(*model.checkpoint->file, *model.tokenizer, messages);
  }
  std::vector<std::int32_t> ids = model.tokenizer->encode(
      item.prompt, options.special ? models::SpecialTokens::Parse : models::SpecialTokens::Text);
  const bool wants_bos = model.tokenizer->add_bos || ids.empty();
  if (wants_bos && model.tokenizer->bos) ids.insert(ids.begin(), *model.tokenizer->bos);
  require<InputError>(!ids.empty(), "empty prompt, and {} has no BOS token to start from",
                      model.checkpoint->file->path().string());
  return ids;
}

engine::Request make_request(const GenerateOptions& options, const Model& model,
                             const BatchItem& item) {
  engine::Request request;
  request.prompt = encode_prompt(options, model, item);
  const std::int64_t context = model.transformer.shape().context_length;
  require<InputError>(static_cast<std::int64_t>(request.prompt.size()) < context,
                      "prompt of {} tokens, the model's context is {}", request.prompt.size(),
                      context);
  request.max_tokens = item.options.max_tokens;
  request.stop = item.options.stop;
  std::erase(request.stop, std::string());
  if (!options.ignore_eos) request.stop_ids = model.tokenizer->stop_ids;
  request.sampling = item.options.sampling;
  return request;
}

const char* finish_name(engine::FinishReason reason) {
  switch (reason) {
    case engine::FinishReason::Stop:
      return "stop";
    case engine::FinishReason::Length:
      return "length";
    case engine::FinishReason::Cancelled:
      break;
  }
  return "cancelled";
}

Json as_json(const BatchItem& item, std::size_t index, const engine::Completion& completion) {
  Json out = {{"index", index}};
  if (!item.id.is_null()) out["id"] = item.id;
  if (item.messages.empty()) {
    out["prompt"] = item.prompt;
  } else {
    out["messages"] = Json::array();
    for (const auto& m : item.messages) {
      out["messages"].push_back({{"role", m.role}, {"content", m.content}});
    }
  }
  out["text"] = completion.text;
  out["tokens"] = completion.tokens;
  out["finish_reason"] = finish_name(completion.finish);
  out["prompt_tokens"] = completion.prompt_tokens;
  out["completion_tokens"] = completion.tokens.size();
  return out;
}

/// "37 tokens, 12.3 tokens/s" for the log of a single prompt.
std::string speed_line(const engine::Completion& completion) {
  const auto n = static_cast<double>(completion.tokens.size());
  return fmt::format("prompt {} tokens in {:.2f} s, {} tokens in {:.2f} s ({:.1f} tokens/s)",
                     completion.prompt_tokens, completion.prompt_seconds, completion.tokens.size(),
                     completion.decode_seconds,
                     completion.decode_seconds > 0 ? n / completion.decode_seconds : 0.0);
}

void generate_one(const GenerateOptions& options, Model& model, Progress& progress) {
  BatchItem item;
  item.prompt = options.prompt;
  item.options = options.prompt_options;
  const engine::Request request = make_request(options, model, item);
  const bool stream = options.format == "text";
  const engine::OnText on_text = [stream](std::size_t, const std::string& piece) {
    if (stream) {
      print(piece);
      flush_output();
    }
    return true;
  };
  const std::vector<engine::Completion> completions = engine::generate(
      model.decoder(), {&request, 1}, [&](std::int32_t id) { return model.tokenizer->piece(id); },
      {.n_ctx = 0, .n_parallel = 1, .n_batch = 512, .cancel = &stop_flag()}, on_text);
  const engine::Completion& completion = completions.front();
  if (stream) {
    print("\n");
  } else {
    print(to_text(as_json(item, 0, completion), false));
  }
  flush_output();
  progress.line(speed_line(completion));
  if (completion.finish == engine::FinishReason::Cancelled) {
    throw Interrupted(fmt::format("interrupted after {} tokens", completion.tokens.size()));
  }
}

void generate_batch(const GenerateOptions& options, Model& model,
                    const std::vector<BatchItem>& items, Progress& progress) {
  std::vector<engine::Request> requests;
  std::int64_t at_most = 0;
  for (const BatchItem& item : items) {
    try {
      requests.push_back(make_request(options, model, item));
    } catch (const InputError& e) {
      throw InputError(fmt::format("{}:{}: {}", options.batch, item.line, e.what()));
    }
    const std::int64_t room = model.transformer.shape().context_length -
                              static_cast<std::int64_t>(requests.back().prompt.size());
    at_most +=
        item.options.max_tokens < 0 ? room : std::min<std::int64_t>(item.options.max_tokens, room);
  }
  progress.stage(fmt::format("generate {} prompts, at most {} tokens", items.size(), at_most),
                 at_most);
  std::int64_t pieces = 0;
  const engine::OnText on_text = [&](std::size_t, const std::string&) {
    progress.advance(std::min(++pieces, at_most - 1), {});
    return true;
  };
  const std::vector<engine::Completion> completions = engine::generate(
      model.decoder(), requests, [&](std::int32_t id) { return model.tokenizer->piece(id); },
      {.n_ctx = 0, .n_parallel = options.parallel, .n_batch = 512, .cancel = &stop_flag()},
      on_text);
  progress.advance(at_most, {});
  std::size_t cancelled = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    print(to_text(as_json(items[i], i, completions[i]), false));
    if (completions[i].finish == engine::FinishReason::Cancelled) ++cancelled;
  }
  flush_output();
  if (cancelled > 0) {
    throw Interrupted(fmt::format(
        "interrupted: {} of {} prompts finished, the others are marked cancelled in the output",
        items.size() - cancelled, items.size()));
  }
}

void generate(const GenerateOptions& options) {
  // Before the model is loaded: a malformed line is told at once.
  std::vector<BatchItem> items;
  if (options.from_batch) items = read_batch(options.batch, options.prompt_options);
  Runtime runtime(options.run);
  Model model(options.model, runtime.context, options.run.device);
  Progress progress(options.run.quiet);
  if (options.from_batch) {
    generate_batch(options, model, items, progress);
  } else {
    generate_one(options, model, progress);
  }
}

void add_sampling_options(CLI::App& cmd, PromptOptions& options) {
  constexpr int kMaxInt = std::numeric_limits<int>::max();
  engine::SamplingOptions& sampling = options.sampling;
  cmd.add_option("-n,--n-predict", options.max_tokens, "Tokens at most; -1: until the end of text")
      ->check(integer_between(-1, kMaxInt))
      ->capture_default_str();
  cmd.add_option("--temp", sampling.temperature, "Temperature; 0: greedy")
      ->check(finite_between(0, 100))
      ->capture_default_str();
  cmd.add_option("--top-k", sampling.top_k, "Keep the k most likely; 0: off")
      ->check(integer_between(0, kMaxInt))
      ->capture_default_str();
  cmd.add_option("--top-p", sampling.top_p, "Keep the most likely up to this probability; 1: off")
      ->check(finite_between(0, 1))
      ->capture_default_str();
  cmd.add_option("--min-p", sampling.min_p, "Drop those less likely than this share of the best")
      ->check(finite_between(0, 1))
      ->capture_default_str();
  cmd.add_option("--repeat-penalty", sampling.repeat_penalty, "Penalty on repeated tokens; 1: off")
      ->check(finite_between(0.01, 100))
      ->capture_default_str();
  cmd.add_option("--repeat-last-n", sampling.repeat_last_n, "Tokens it looks back on; -1: all")
      ->check(integer_between(-1, kMaxInt))
      ->capture_default_str();
  cmd.add_option("--seed", sampling.seed, "Seed of the draws")
      ->check(integer_between(0, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  cmd.add_option("--stop", options.stop, "Text that ends a continuation; may be repeated")
      ->allow_extra_args(false);
}

}  // namespace

void add_generate(CLI::App& app, Action& action) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* cmd =
      app.add_subcommand("generate", "Continue a prompt, or every line of a JSONL file");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf), dense or hybrid")->required();
  auto* source = cmd->add_option_group("prompt");
  source->add_option("-p,--prompt", options->prompt, "Prompt; its text is plain text");
  CLI::Option* batch = source->add_option("--batch", options->batch,
                                          "JSONL file, one object with prompt or messages a line");
  source->require_option(1);
  cmd->add_flag("--chat", options->chat, "Put the prompt into the model's chat template");
  cmd->add_flag("--special", options->special, "Parse special tokens in the prompt");
  cmd->add_flag("--ignore-eos", options->ignore_eos, "Go on after an end-of-text token");
  cmd->add_option("--parallel", options->parallel, "Sequences of a batch that run together")
      ->check(integer_between(1, 4096))
      ->capture_default_str();
  add_sampling_options(*cmd, options->prompt_options);
  add_output_option(*cmd, options->format, {"text", "json"});
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  cmd->footer(
      R"(A line of a batch may set id, max_tokens, temperature, top_k, top_p, min_p, repeat_penalty,
repeat_last_n, seed and stop (a string or a list) for itself. Results come as JSONL in input order.

Examples:
  moesaic generate hybrid.gguf -p "The capital of France is" -n 32 --temp 0
  moesaic generate SmolLM2.gguf -p "Write a haiku about rivers." --chat
  moesaic generate SmolLM2.gguf --batch prompts.jsonl --parallel 16 > answers.jsonl)");
  cmd->callback([options, batch, &action] {
    options->from_batch = batch->count() > 0;
    action = [options] { generate(*options); };
  });
}

}  // namespace moesaic::tools
