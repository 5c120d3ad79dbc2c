#include "converter/recovery/recover_file.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "converter/digest.h"
#include "kernels/base/error.h"
#include "models/gguf_writer.h"

namespace moesaic::converter {
namespace {

using Json = nlohmann::ordered_json;

void check_pair(const models::Checkpoint& dense, const models::Checkpoint& hybrid,
                const std::string& dense_digest) {
  const std::string path = hybrid.file->path().string();
  require<InputError>(models::is_hybrid(*hybrid.file),
                      "{}: has no converted layer, expected a hybrid to recover", path);
  const std::string source = hybrid.file->get_string(models::kKeySourceDigest);
  require<InputError>(source == dense_digest,
                      "{}: was made of the checkpoint with SHA-256 {}, {} has {}", path, source,
                      dense.file->path().string(), dense_digest);
}

}  // namespace

std::string options_json(const RecoverOptions& o) {
  Json json{{"tokens", o.tokens},
            {"scale_tokens", o.scale_tokens},
            {"scale_rate", o.scale_rate},
            {"attention_rank", o.attention_rank},
            {"text", o.text},
            {"self_tokens", o.self_tokens},
            {"batch", o.batch},
            {"part", o.part},
            {"n_ctx", o.n_ctx},
            {"rate", o.rate},
            {"router_rate", o.router_rate},
            {"scaled_steps", o.scaled_steps},
            {"warm_up", o.warm_up},
            {"clip", o.clip},
            {"auxiliary", o.auxiliary},
            {"straight_through", o.straight_through},
            {"gate_width", o.gate_width},
            {"refit_every", o.refit_every},
            {"refit_memory", o.refit_memory},
            {"refit_ridge", o.refit_ridge},
            {"threshold_gain", o.threshold_gain},
            {"straight_through_inputs", o.straight_through_inputs},
            {"expert_type",
             o.expert_type ? std::string(traits(*o.expert_type).name) : std::string("auto")},
            {"held_out", o.held_out},
            {"seed", o.seed}};
  if (o.device) json["device"] = "cuda";  // other roundings: another recovery
  return json.dump();
}

std::string recovery_json(const RecoveryReport& report) {
  Json curve = Json::array();
  for (const auto& p : report.curve) {
    curve.push_back({{"tokens", p.tokens},
                     {"kl", p.kl},
                     {"auxiliary", p.auxiliary},
                     {"held_out", p.held_out},
                     {"active", p.active}});
  }
  return Json{{"tokens", report.tokens},
              {"seconds", report.seconds},
              {"kl_start", report.kl_start},
              {"kl_trained", report.kl_trained},
              {"kl_rounded", report.kl_rounded},
              {"kl_packed", report.kl_packed},
              {"active_start", report.active_start},
              {"active_trained", report.active_trained},
              {"active_packed", report.active_packed},
              {"curve", std::move(curve)}}
      .dump();
}

std::vector<std::int32_t> recovery_text(const std::string& data, const RecoverOptions& options,
                                        std::shared_ptr<const models::Checkpoint> dense,
                                        const models::Tokenizer& tokenizer,
                                        const MakeDecoder& make_decoder, StateFolder& state,
                                        Context& ctx, engine::Monitor& monitor) {
  std::vector<std::int32_t> tokens;
  if (data != "self") {
    tokens = load_calibration(data, tokenizer, options.n_ctx, options.text).tokens;
  }
  const std::int64_t wanted = data == "self" ? options.text : options.self_tokens;
  if (wanted == 0) return tokens;
  std::optional<std::vector<std::int32_t>> own = state.load_calibration();
  if (!own) {
    const auto decoder = make_decoder ? make_decoder(dense) : nullptr;
    models::Transformer model(std::move(dense), ctx);
    own = sample_calibration(model, tokenizer, options.n_ctx, wanted, options.seed, monitor,
                             decoder.get())
              .tokens;
    state.save_calibration(*own);
  }
  // In front, so that the held-out windows, the last ones, are of the text that was given.
  tokens.insert(tokens.begin(), own->begin(), own->end());
  return tokens;
}

RecoveryReport recover_file(const RecoverFileOptions& options, Context& ctx,
                            engine::Monitor& monitor) {
  const auto dense = models::Checkpoint::load(options.dense);
  const auto hybrid = models::Checkpoint::load(options.hybrid);
  const std::string dense_digest = sha256_file(options.dense);
  check_pair(*dense, *hybrid, dense_digest);
  const auto tokenizer = models::load_tokenizer(*dense->file);
  models::check_writable(options.output, hybrid->file->file_bytes());
  RecoverOptions recovery = options.recover;
  recovery.n_ctx = std::min(recovery.n_ctx, dense->config.context_length);
  const Json fingerprint = {
      {"program", "moesaic " MOESAIC_VERSION},
      {"source_digest", dense_digest},
      {"hybrid_digest", sha256_file(options.hybrid)},
      {"data", options.data == "self" ? options.data : sha256_file(options.data)},
      {"recover", Json::parse(options_json(recovery))},
      {"threads", ctx.pool.n_threads()}};
  StateFolder state(options.output, fingerprint.dump(1), options.resume);
  const std::vector<std::int32_t> tokens = recovery_text(options.data, recovery, dense, *tokenizer,
                                                         options.decoder, state, ctx, monitor);
  monitor.line(fmt::format("recovers on {} tokens of text; needs about {:.1f} GB of memory",
                           tokens.size(),
                           static_cast<double>(recovery_bytes(
                               *hybrid, recovery, static_cast<std::int64_t>(tokens.size()))) /
                               1e9));
  const Recovered recovered = recover(dense, hybrid, tokens, recovery,
                                      {state.training_path(), state.scales_path()}, ctx, monitor);
  write_recovered(*hybrid->file, recovered, options.output);
  const Json report = {{"dense", options.dense.string()},
                       {"hybrid", options.hybrid.string()},
                       {"output", options.output.string()},
                       {"data", options.data},
                       {"options", Json::parse(options_json(recovery))},
                       {"recovery", Json::parse(recovery_json(recovered.report))}};
  models::write_file_atomically(options.output.string() + ".report.json",
                                report.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
  RecoverFileOptions as_run = options;
  as_run.recover = recovery;
  models::write_file_atomically(options.output.string() + ".report.html",
                                recovery_html(as_run, recovered.report));
  state.remove();
  return recovered.report;
}

}  // namespace moesaic::converter
