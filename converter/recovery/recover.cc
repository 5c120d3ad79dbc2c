#include "converter/recovery/recover.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>

#include "converter/recovery/pack.h"
#include "converter/recovery/pack_matrix.h"
#include "converter/recovery/pack_self_routed.h"
#include "converter/recovery/trainer.h"
#include "models/architecture.h"
#include "models/gguf_writer.h"
#include "models/mixture_file.h"

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
  for (const auto& p : report.curve) {
    curve.push_back({p.tokens, p.kl, p.auxiliary, p.held_out, p.active});
  }
  return Json{{"seconds", report.seconds},
              {"kl_start", report.kl_start},
              {"active_start", report.active_start},
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
    report.active_start = json.at("active_start");
    report.curve.clear();
    const Json& sums = json.at("running");
    running = {sums.at(0), sums.at(1), sums.at(2)};
    for (const auto& p : json.at("curve")) {
      report.curve.push_back({p.at(0), p.at(1), p.at(2), p.at(3), p.at(4)});
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

// One training from where its file stands to its end. report.tokens: those of the one before.
void train(Trainer& trainer, const RecoverOptions& options, std::string_view stage,
           const std::filesystem::path& state, RecoveryReport& report, engine::Monitor& monitor) {
  Running running;
  if (std::filesystem::exists(state)) {
    from_note(trainer.load(state), state, report, running);
    monitor.line(fmt::format("{} goes on after step {} of {}", stage, trainer.step_index(),
                             trainer.n_steps()));
  } else if (report.tokens == 0) {
    const Judgement start = trainer.judge();
    report.kl_start = start.kl;
    report.active_start = start.active;
    monitor.line(fmt::format("before recovery: KL {:.4f} on held-out text at {:.3f} active",
                             start.kl, start.active));
  }
  const Clock::time_point start = Clock::now();
  Clock::time_point saved = start;
  const double seconds_before = report.seconds;
  const std::int64_t first_step = trainer.step_index();
  auto& converted = trainer.model().converted();
  const bool routers =
      std::any_of(converted.begin(), converted.end(), [](auto& c) { return c.moe() != nullptr; });
  const auto routers_note = [&](double loss) {
    return routers ? fmt::format(", routers {:.3f}", loss) : std::string();
  };
  const auto save = [&] {
    report.seconds = seconds_before + since(start);
    trainer.save(state, to_note(report, running));
    saved = Clock::now();
  };
  monitor.stage(stage, trainer.n_steps());
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
    monitor.advance(step, fmt::format("KL {:.4f}{}, {:.0f} tokens/s", result.kl,
                                      routers_note(result.auxiliary), rate));
    if (step % options.judge_every == 0 || trainer.done()) {
      const auto n = static_cast<double>(running.n);
      const Judgement judgement = trainer.judge();
      const RecoveryReport::Point point{.tokens = report.tokens + step * options.batch,
                                        .kl = running.kl / n,
                                        .auxiliary = running.auxiliary / n,
                                        .held_out = judgement.kl,
                                        .active = judgement.active};
      monitor.line(fmt::format(
          "step {} of {}, {} tokens: KL {:.4f}, held out {:.4f} at {:.3f} active{}, norm {:.3f}, "
          "{:.0f} tokens/s",
          step, trainer.n_steps(), point.tokens, point.kl, point.held_out, point.active,
          routers_note(point.auxiliary), result.gradient_norm, rate));
      report.curve.push_back(point);
      running = {};
    }
    if (since(saved) > options.save_seconds || trainer.done()) save();
  }
  report.tokens += trainer.n_steps() * options.batch;
  report.seconds = seconds_before + since(start);
  if (trainer.step_index() > first_step && !options.device) {
    monitor.line(breakdown(trainer, since(start)));
  }
}

// Refuses before the training what cannot be trained or could not be written after it.
void check_types(const models::Checkpoint& hybrid, std::optional<DType> type) {
  for (const models::LayerWeights& layer : hybrid.layers) {
    if (const auto* mixture = std::get_if<kernels::MixtureView>(&layer.mlp)) {
      throw InputError(fmt::format(
          "{}: holds a layer of kind {}, expected dense, glu+low_rank, glu+gate or glu+input ones: "
          "only these are trained end to end",
          hybrid.file->path().string(), models::kind_name(mixture->kind)));
    }
    if (const auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp)) {
      writable_type(moe->experts.dtype, type, moe->d_model());
    } else if (const auto* routed = std::get_if<kernels::SelfRoutedView>(&layer.mlp)) {
      writable_types(*routed, type);
    }
  }
}

bool has_scales(const models::Checkpoint& hybrid) {
  return std::any_of(hybrid.layers.begin(), hybrid.layers.end(), [](const auto& layer) {
    const auto* routed = std::get_if<kernels::SelfRoutedView>(&layer.mlp);
    if (routed == nullptr) return false;
    const MatrixTypes types = types_of(*routed);
    return std::any_of(types.begin(), types.end(), BlockScales::can_tune);
  });
}

// Takes layers in the place of the hybrid's own.
void put(models::Checkpoint& hybrid, const PackedLayers& layers) {
  for (const auto& [layer, packed] : layers) {
    hybrid.layers[static_cast<std::size_t>(layer)].mlp = view(packed);
  }
}

// The metadata that tells the shares of self-routed layers, if there are any.
void set_shares(const models::GgufFile& hybrid, const Recovered& recovered,
                models::GgufWriter& writer) {
  using models::PackedSelfRouted;
  bool any = false;
  for (const auto& [key, share] :
       {std::pair{models::kKeyInputShare, &PackedSelfRouted::input_share},
        {models::kKeyGateShare, &PackedSelfRouted::gate_share},
        {models::kKeyHiddenShare, &PackedSelfRouted::hidden_share}}) {
    if (hybrid.find(key) == nullptr) continue;
    std::vector<double> shares = hybrid.get_floats(key);
    for (const auto& [layer, packed] : recovered.layers) {
      const auto* routed = std::get_if<PackedSelfRouted>(&packed);
      if (routed == nullptr) continue;
      shares.at(static_cast<std::size_t>(layer)) = static_cast<double>(routed->*share);
      any = true;
    }
    writer.set(std::string(key), models::GgufValue::f32_array(std::move(shares)));
  }
  if (any) {
    writer.set(std::string(models::kKeyActiveFraction),
               models::GgufValue::f32(static_cast<float>(recovered.active_fraction)));
  }
}

void put(models::Checkpoint& hybrid, const std::vector<PackedAttention>& attention) {
  for (const PackedAttention& own : attention) {
    models::LayerWeights& layer = hybrid.layers[static_cast<std::size_t>(own.layer)];
    layer.w_q = own.matrices[kQuery].view();
    layer.w_k = own.matrices[kKey].view();
    layer.w_v = own.matrices[kValue].view();
    layer.w_o = own.matrices[kAttentionOutput].view();
  }
}

}  // namespace

Recovered recover(std::shared_ptr<const models::Checkpoint> dense,
                  std::shared_ptr<const models::Checkpoint> hybrid,
                  std::span<const std::int32_t> tokens, const RecoverOptions& options,
                  const RecoveryFiles& state, Context& ctx, engine::Monitor& monitor) {
  check_types(*hybrid, options.expert_type);
  for (const std::int64_t n : {options.tokens, options.scale_tokens}) {
    require<InputError>(n == 0 || n >= options.batch,
                        "recovery: {} tokens to train on, expected {}, one step's, or more", n,
                        options.batch);
  }
  const bool tunes = options.scale_tokens > 0 && (options.tokens > 0 || has_scales(*hybrid));
  require<InputError>(options.tokens > 0 || tunes,
                      "recovery: neither weights nor scales to train, of which only self-routed "
                      "layers in Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 have any");
  Recovered out;
  RecoveryReport& report = out.report;
  models::Checkpoint written = *hybrid;  // its views go over to what is packed
  if (options.tokens > 0) {
    Trainer trainer(dense, *hybrid, ctx, tokens, options);
    train(trainer, options, "recover", state.weights, report, monitor);
    const Clock::time_point start = Clock::now();
    const Judgement trained = trainer.judge();
    report.kl_trained = trained.kl;
    report.active_trained = trained.active;
    PackedModel packed = pack_trained(ctx, trainer, *hybrid, options.expert_type,
                                      kRoundingTokens / options.n_ctx, monitor);
    out.layers = std::move(packed.layers);
    out.attention = std::move(packed.attention);
    put(written, out.layers);
    put(written, out.attention);
    const Judgement rounded = trainer.judge();
    report.kl_rounded = report.kl_packed = rounded.kl;
    report.active_packed = rounded.active;
    report.seconds += since(start);
    monitor.line(
        fmt::format("trained: KL {:.4f} on held-out text at {:.3f} active, {:.4f} at "
                    "{:.3f} rounded",
                    trained.kl, trained.active, rounded.kl, rounded.active));
  }
  if (tunes && has_scales(written)) {
    Trainer trainer(dense, written, ctx, tokens, options, Learns::Scales);
    train(trainer, options, "tune scales", state.scales, report, monitor);
    const Clock::time_point start = Clock::now();
    if (options.tokens == 0) {
      const Judgement trained = trainer.judge();
      report.kl_trained = trained.kl;
      report.kl_rounded = report.kl_start;
      report.active_trained = trained.active;
    }
    PackedLayers scaled =
        pack_scaled(ctx, trainer, written, kRoundingTokens / options.n_ctx, monitor);
    put(written, scaled);
    const Judgement packed = trainer.judge();
    report.kl_packed = packed.kl;
    report.active_packed = packed.active;
    for (auto& [layer, own] : scaled) {
      const auto before = std::find_if(out.layers.begin(), out.layers.end(),
                                       [&](const auto& l) { return l.first == layer; });
      if (before == out.layers.end()) {
        out.layers.emplace_back(layer, std::move(own));
      } else {
        before->second = std::move(own);
      }
    }
    report.seconds += since(start);
  }
  out.active_fraction = written.active_fraction();
  monitor.line(
      fmt::format("after recovery: KL {:.4f} on held-out text at {:.3f} active, as written",
                  report.kl_packed, report.active_packed));
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
  set_shares(hybrid, recovered, writer);
  const models::LayerTensorNames& names =
      models::find_architecture(hybrid.get_string("general.architecture"))->layer;
  // Tensors by name; those of a secret MoE stand together in the place of its first.
  std::map<std::string, models::PackedSelfRouted::Tensor, std::less<>> replaced;
  std::map<std::string, std::pair<int, const models::PackedSecretMoe*>> moes;
  for (const auto& [layer, packed] : recovered.layers) {
    if (const auto* moe = std::get_if<models::PackedSecretMoe>(&packed)) {
      moes[fmt::format("blk.{}.moe.", layer)] = {layer, moe};
    } else {
      for (auto& t : std::get<models::PackedSelfRouted>(packed).tensors(names, layer)) {
        replaced[t.name] = t;
      }
    }
  }
  for (const PackedAttention& own : recovered.attention) {
    const std::array<std::string_view, kAttentionMatrices> own_names = {names.w_q, names.w_k,
                                                                        names.w_v, names.w_o};
    for (std::size_t m = 0; m < own_names.size(); ++m) {
      const PackedAttention::Matrix& matrix = own.matrices[m];
      const std::string name = fmt::format("blk.{}.{}", own.layer, own_names[m]);
      replaced[name] = {name, matrix.dtype, {matrix.rows, matrix.cols}, matrix.bytes.span()};
    }
  }
  for (const models::GgufTensor& t : hybrid.tensors()) {
    if (const auto own = replaced.find(t.name); own != replaced.end()) {
      writer.add_tensor(t.name, own->second.dtype, own->second.dims, own->second.data);
      continue;
    }
    const auto moe = std::find_if(moes.begin(), moes.end(),
                                  [&](const auto& m) { return t.name.starts_with(m.first); });
    if (moe == moes.end()) {
      writer.add_tensor(t.name, t.dtype, t.dims, {t.data, static_cast<std::size_t>(t.bytes)});
    } else if (auto& [layer, packed] = moe->second; packed != nullptr) {
      packed->add_to(writer, layer);
      packed = nullptr;
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
  // Inputs, outputs and hidden values of a layer on the text that rounding goes by, and moments.
  const std::int64_t packing =
      4 * kRoundingTokens * (5 * c.d_model + 3 * c.d_ff) + 16 * c.d_ff * c.d_ff;
  return (4 * 4 + 2) * mlps + frozen + tapes + packing + 2 * n_tokens * c.d_model +
         hybrid.file->file_bytes() * 3 + (std::int64_t{300} << 20);
}

}  // namespace moesaic::converter
