#include "converter/recovery/recover.h"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "converter/recovery/pack.h"
#include "converter/recovery/trainer.h"
#include "models/gguf_writer.h"

namespace moesaic::converter {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr std::int64_t kRoundingTokens = 16384;  // behind the moments that rounding uses

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Sums of what steps gave since the last judgement.
struct Running {
  double kl = 0, auxiliary = 0;
  std::int64_t n = 0;
};

// What the saved training says of the report.
std::string to_note(const RecoveryReport& report, const Running& running) {
  Json curve = Json::array();
  for (const auto& p : report.curve) curve.push_back({p.tokens, p.kl, p.auxiliary, p.held_out});
  return Json{{"seconds", report.seconds},
              {"kl_start", report.kl_start},
              {"running", {running.kl, running.auxiliary, running.n}},
              {"curve", curve}}
      .dump();
}

void from_note(const std::string& note, const std::filesystem::path& file, RecoveryReport& report,
               Running& running) {
  try {
    const Json json = Json::parse(note);
    report.seconds = json.at("seconds");
    report.kl_start = json.at("kl_start");
    const Json& sums = json.at("running");
    running = {sums.at(0), sums.at(1), sums.at(2)};
    for (const auto& p : json.at("curve")) {
      report.curve.push_back({p.at(0), p.at(1), p.at(2), p.at(3)});
    }
  } catch (const nlohmann::json::exception& e) {
    throw FormatError(fmt::format("{}: its note is damaged: {}", file.string(), e.what()));
  }
}

std::string breakdown(Trainer& trainer, double seconds) {
  const StepTimes& t = trainer.model().times();
  const double teacher = trainer.teacher().seconds();
  const double known = teacher + t.attention_forward + t.mlp_forward + t.head + t.mlp_backward +
                       t.attention_backward + trainer.optimizer_seconds();
  const auto share = [&](double part) { return 100 * part / seconds; };
  return fmt::format(
      "time: teacher {:.0f} %, attention {:.0f} + {:.0f} %, MLPs {:.0f} + {:.0f} %, head {:.0f} %, "
      "Adam {:.0f} %, rest {:.0f} % (forward + backward)",
      share(teacher), share(t.attention_forward), share(t.attention_backward), share(t.mlp_forward),
      share(t.mlp_backward), share(t.head), share(trainer.optimizer_seconds()),
      share(seconds - known));
}

// The training itself, from where it stands to its end.
void train(Trainer& trainer, const RecoverOptions& options, const std::filesystem::path& state,
           RecoveryReport& report, Running running, engine::Monitor& monitor) {
  const Clock::time_point start = Clock::now();
  Clock::time_point saved = start;
  const double seconds_before = report.seconds;
  const std::int64_t first_step = trainer.step_index();
  const auto save = [&] {
    report.seconds = seconds_before + since(start);
    trainer.save(state, to_note(report, running));
    saved = Clock::now();
  };
  monitor.stage("recover", trainer.n_steps());
  while (!trainer.done()) {
    if (monitor.cancelled()) {
      save();
      monitor.check();
    }
    const StepResult result = trainer.step();
    running.kl += result.kl;
    running.auxiliary += result.auxiliary;
    ++running.n;
    const std::int64_t step = trainer.step_index();
    const double rate =
        static_cast<double>((step - first_step) * options.batch) / std::max(1e-9, since(start));
    monitor.advance(step, fmt::format("KL {:.4f}, routers {:.3f}, {:.0f} tokens/s", result.kl,
                                      result.auxiliary, rate));
    if (step % options.judge_every == 0 || trainer.done()) {
      const auto n = static_cast<double>(running.n);
      const RecoveryReport::Point point{.tokens = step * options.batch,
                                        .kl = running.kl / n,
                                        .auxiliary = running.auxiliary / n,
                                        .held_out = trainer.held_out_divergence()};
      monitor.line(fmt::format(
          "step {} of {}, {} tokens: KL {:.4f}, held out {:.4f}, routers {:.3f}, norm {:.3f}, "
          "{:.0f} tokens/s",
          step, trainer.n_steps(), point.tokens, point.kl, point.held_out, point.auxiliary,
          result.gradient_norm, rate));
      report.curve.push_back(point);
      running = {};
    }
    if (since(saved) > options.save_seconds || trainer.done()) save();
  }
  report.seconds = seconds_before + since(start);
  if (trainer.step_index() > first_step) monitor.line(breakdown(trainer, since(start)));
}

}  // namespace

Recovered recover(std::shared_ptr<const models::Checkpoint> dense,
                  std::shared_ptr<const models::Checkpoint> hybrid,
                  std::span<const std::int32_t> tokens, const RecoverOptions& options,
                  const std::filesystem::path& state, Context& ctx, engine::Monitor& monitor) {
  Recovered out;
  RecoveryReport& report = out.report;
  Trainer trainer(dense, *hybrid, ctx, tokens, options);
  Running running;
  if (std::filesystem::exists(state)) {
    from_note(trainer.load(state), state, report, running);
    monitor.line(fmt::format("recovery goes on after step {} of {}", trainer.step_index(),
                             trainer.n_steps()));
  } else {
    report.kl_start = trainer.held_out_divergence();
    monitor.line(fmt::format("before recovery: KL {:.4f} on held-out text", report.kl_start));
  }
  train(trainer, options, state, report, running, monitor);
  const Clock::time_point start = Clock::now();
  report.tokens = trainer.n_steps() * options.batch;
  report.kl_trained = trainer.held_out_divergence();
  out.layers = pack_trained(ctx, trainer, *hybrid, kRoundingTokens / options.n_ctx, monitor);
  for (auto& [layer, packed] : out.layers) trainer.model().replace(layer, packed.view());
  report.kl_packed = trainer.held_out_divergence();
  report.seconds += since(start);
  monitor.line(fmt::format("after recovery: KL {:.4f} on held-out text, {:.4f} as written",
                           report.kl_trained, report.kl_packed));
  return out;
}

void write_recovered(const models::GgufFile& hybrid, const Recovered& recovered,
                     const std::filesystem::path& output) {
  using models::GgufValue;
  models::GgufWriter writer;
  for (const auto& [key, value] : hybrid.metadata()) writer.set(key, value);
  writer.set("moesaic.recovery.tokens",
             GgufValue::u64(static_cast<std::uint64_t>(recovered.report.tokens)));
  writer.set("moesaic.recovery.kl_start",
             GgufValue::f32(static_cast<float>(recovered.report.kl_start)));
  writer.set("moesaic.recovery.kl_end",
             GgufValue::f32(static_cast<float>(recovered.report.kl_packed)));
  std::vector<bool> written(recovered.layers.size(), false);
  for (const models::GgufTensor& t : hybrid.tensors()) {
    bool replaced = false;
    for (std::size_t i = 0; i < recovered.layers.size(); ++i) {
      const auto& [layer, packed] = recovered.layers[i];
      if (!t.name.starts_with(fmt::format("blk.{}.moe.", layer))) continue;
      if (!written[i]) packed.add_to(writer, layer);
      written[i] = replaced = true;
    }
    if (!replaced) {
      writer.add_tensor(t.name, t.dtype, t.dims, {t.data, static_cast<std::size_t>(t.bytes)});
    }
  }
  writer.write(output);
}

std::int64_t recovery_bytes(const models::Checkpoint& hybrid, const RecoverOptions& options,
                            std::int64_t n_tokens) {
  const models::ModelConfig& c = hybrid.config;
  const std::int64_t mlps = 3 * c.d_model * c.d_ff * c.n_layers;
  const std::int64_t heads = (c.n_heads + 2 * c.n_kv_heads) * std::int64_t{c.head_dim};
  const std::int64_t frozen = 2 * (c.vocab_size * c.d_model + 2 * c.n_layers * heads * c.d_model);
  const std::int64_t tapes =
      std::min(std::int64_t{4} << 30,
               (10 * c.d_ff + 16 * c.d_model + 12 * heads) * options.part * c.n_layers);
  return (4 * 4 + 2) * mlps + frozen + tapes + 2 * n_tokens * c.d_model +
         hybrid.file->file_bytes() * 3 + (std::int64_t{300} << 20);
}

}  // namespace moesaic::converter
