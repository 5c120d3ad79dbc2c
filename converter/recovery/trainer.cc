#include "converter/recovery/trainer.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "kernels/base/error.h"
#include "models/gguf.h"
#include "models/gguf_writer.h"

namespace moesaic::converter {
namespace {

constexpr std::string_view kKeyStep = "moesaic.training.step";
constexpr std::string_view kKeyNote = "moesaic.training.note";
constexpr std::string_view kKeyAdamSteps = "moesaic.training.adam_steps";
constexpr std::string_view kKeyRouterScale = "moesaic.training.router_scale";

// Memory that the layers' tapes may take before layers are run a second time instead.
constexpr std::int64_t kMostTapeBytes = std::int64_t{4} << 30;

bool recomputes(const models::ModelConfig& c, std::int64_t part) {
  const std::int64_t heads = (c.n_heads + 2 * c.n_kv_heads) * std::int64_t{c.head_dim};
  const std::int64_t bytes_a_token = 10 * c.d_ff + 16 * c.d_model + 12 * heads;
  return bytes_a_token * part * c.n_layers > kMostTapeBytes;
}

RecoverOptions checked(RecoverOptions o) {
  require<InputError>(o.n_ctx > 0 && o.batch > 0 && o.batch % o.n_ctx == 0,
                      "recovery: {} tokens a step, expected a multiple of {}, the window's length",
                      o.batch, o.n_ctx);
  o.part = std::clamp(o.part / o.n_ctx * o.n_ctx, o.n_ctx, o.batch);
  return o;
}

}  // namespace

Trainer::Trainer(std::shared_ptr<const models::Checkpoint> dense, const models::Checkpoint& hybrid,
                 Context& ctx, std::span<const std::int32_t> tokens, const RecoverOptions& options,
                 Learns learns)
    : options_(checked(options)),
      learns_(learns),
      ctx_{ctx.pool, ctx.workspace, ctx.tally, Activations::BF16},
      tokens_(tokens),
      model_(hybrid, ctx_, options.n_ctx, recomputes(hybrid.config, options_.part)),
      n_windows_(static_cast<std::int64_t>(tokens.size()) / options.n_ctx) {
  require<InputError>(n_windows_ >= 2, "recovery: {} windows of {} tokens, expected two at least",
                      n_windows_, options_.n_ctx);
  const std::int64_t held_out = std::clamp<std::int64_t>(options_.held_out / options_.n_ctx, 1,
                                                         std::max<std::int64_t>(1, n_windows_ / 4));
  n_train_ = n_windows_ - held_out;
  const AdamUnit unit = options_.scaled_steps ? AdamUnit::RootMeanSquare : AdamUnit::One;
  for (std::size_t i = 0; i < model_.converted().size(); ++i) {
    Converted<Bfloat16>& c = model_.converted()[i];
    if (TrainedMoe<Bfloat16>* moe = c.moe()) {
      moe->router.auxiliary = options_.auxiliary;
      moe->router.straight_through = options_.straight_through;
      moe->router.width = options_.gate_width;
      if (options_.refit_every > 0) moments_.try_emplace(i, moe->layer.shape());
    } else {
      c.self_routed()->straight_through = options_.straight_through_inputs;
    }
    if (learns == Learns::Weights) {
      add_weights(c, unit);
    } else {
      add_scales(c, hybrid.layers[static_cast<std::size_t>(c.layer)].mlp, unit);
    }
  }
  if (learns == Learns::Weights && options_.attention_rank > 0) {
    model_.learn_attention(options_.attention_rank, options_.seed);
    add_attention(unit);
  }
  if (options_.device) {
    make_device(*dense, hybrid);
  } else {
    teacher_.emplace(std::move(dense), ctx_, tokens, options_.n_ctx);
  }
  if (options_.refit_every > 0) {
    model_.observe(
        options_.n_ctx, [this](std::size_t index, MatrixView<const std::uint16_t> x,
                               MatrixView<const std::uint16_t> c, std::span<const float> weight) {
          moments_.at(index).add(ctx_, std::exp(-1 / options_.refit_memory), x, c, weight);
        });
  }
}

void Trainer::add_weights(Converted<Bfloat16>& layer, AdamUnit unit) {
  for (const TrainedTensor<float>& t : layer.tensors()) {
    const double rate = t.router ? options_.router_rate : options_.rate;
    tensors_.push_back(
        {layer.layer, t.name, t.router, AdamTensor(t.value, t.gradient, rate, unit)});
  }
}

// B begins at zero, and is in units of its matrix already (low_rank_update.h).
void Trainer::add_attention(AdamUnit unit) {
  for (int l = 0; l < model_.n_layers(); ++l) {
    std::size_t m = 0;
    for (LowRankUpdate<Bfloat16>& update : model_.attention(l).updates()) {
      const std::string name = kAttentionNames[m++];
      tensors_.push_back({l, name + ".a", false,
                          AdamTensor(update.a(), update.a_gradient(), options_.rate, unit)});
      tensors_.push_back(
          {l, name + ".b", false,
           AdamTensor(update.b(), update.b_gradient(), options_.rate, AdamUnit::One)});
    }
  }
}

void Trainer::add_scales(Converted<Bfloat16>& layer, const models::Mlp& mlp, AdamUnit unit) {
  if (layer.self_routed() == nullptr) return;
  const auto& view = std::get<kernels::SelfRoutedView>(mlp);
  const std::array<const WeightView*, 3> matrices = {&view.w_gate, &view.w_up, &view.w_down};
  const auto tensors = layer.tensors();
  for (std::size_t m = 0; m < matrices.size(); ++m) {
    const WeightView& w = *matrices[m];
    if (!BlockScales::can_tune(w.dtype)) continue;
    auto scales = std::make_unique<BlockScales>(w);
    const std::string name = tensors[m].name;
    const auto add = [&](const char* what, std::span<float> value, std::span<float> gradient) {
      if (value.empty()) return;
      tensors_.push_back({layer.layer, name + what, false,
                          AdamTensor(value, gradient, options_.scale_rate, unit)});
    };
    add(".scale", scales->scale(), scales->scale_gradient());
    add(".offset", scales->offset(), scales->offset_gradient());
    scaled_.push_back({layer.layer, m, Matrix(tensors[m].value.data(), w.rows, w.cols),
                       Matrix(tensors[m].gradient.data(), w.rows, w.cols), std::move(scales)});
  }
}

void Trainer::make_device(const models::Checkpoint& dense, const models::Checkpoint& hybrid) {
  require<InputError>(options_.attention_rank == 0,
                      "recovery: the attention learns on the CPU alone");
  require<InputError>(options_.refit_every == 0,
                      "recovery: routers are refitted on the CPU alone (--refit-every)");
  TrainingParts parts;
  parts.dense = &dense;
  parts.hybrid = &hybrid;
  parts.model = &model_;
  for (Trained& t : tensors_) {
    parts.tensors.push_back(&t.adam);
    parts.routers.push_back(t.router);
  }
  parts.learns_scales = learns_ == Learns::Scales;
  for (Scaled& s : scaled_) {
    const auto& all = model_.converted();
    const auto own =
        std::find_if(all.begin(), all.end(), [&](const auto& c) { return c.layer == s.layer; });
    parts.scaled.push_back({static_cast<std::size_t>(own - all.begin()), s.matrix, s.scales.get()});
  }
  parts.tokens = tokens_;
  parts.n_ctx = options_.n_ctx;
  parts.batch = options_.batch;
  parts.part = options_.part;
  parts.recompute = recomputes(hybrid.config, options_.part);
  parts.clip = options_.clip;
  device_ = options_.device(parts);
}

Hybrid<Bfloat16>& Trainer::model() {
  fetch();
  host_ahead_ = true;
  return model_;
}

void Trainer::put() {
  if (device_ != nullptr && host_ahead_) device_->put();
  host_ahead_ = false;
}

void Trainer::fetch() {
  if (device_ != nullptr && device_ahead_) device_->fetch();
  device_ahead_ = false;
}

const BlockScales* Trainer::scales(int layer, std::size_t matrix) const {
  for (const Scaled& s : scaled_) {
    if (s.layer == layer && s.matrix == matrix) return s.scales.get();
  }
  return nullptr;
}

void Trainer::gather_scales() {
  for (Scaled& s : scaled_) s.scales->gather(ctx_, s.gradient);
}

void Trainer::scatter_scales() {
  for (Scaled& s : scaled_) s.scales->scatter(ctx_, s.value);
}

std::span<const std::int32_t> Trainer::window(std::int64_t index) const {
  const auto n = static_cast<std::size_t>(options_.n_ctx);
  return tokens_.subspan(static_cast<std::size_t>(index) * n, n);
}

// Windows come in a random order, pass after pass; an order depends on seed and pass alone, so the
// step's number is all the state there is.
std::vector<std::int64_t> Trainer::windows_of_step(std::int64_t step) const {
  const std::int64_t n = options_.batch / options_.n_ctx;
  std::vector<std::int64_t> chosen;
  std::vector<std::int64_t> order(static_cast<std::size_t>(n_train_));
  std::int64_t shuffled = -1;
  for (std::int64_t i = step * n; i < (step + 1) * n; ++i) {
    const std::int64_t pass = i / n_train_;
    if (pass != shuffled) {
      shuffled = pass;
      std::iota(order.begin(), order.end(), 0);
      std::mt19937_64 rng(options_.seed * 1000003 + static_cast<std::uint64_t>(pass));
      for (std::size_t j = order.size() - 1; j > 0; --j)
        std::swap(order[j], order[rng() % (j + 1)]);
    }
    chosen.push_back(order[static_cast<std::size_t>(i % n_train_)]);
  }
  return chosen;
}

std::ptrdiff_t Trainer::n_routers() {
  return std::count_if(model_.converted().begin(), model_.converted().end(),
                       [](auto& c) { return c.moe() != nullptr; });
}

// The routers' losses are counted in what they are at the start.
void Trainer::measure_router_scale() {
  const std::int64_t first = windows_of_step(0).front();
  auto& converted = model_.converted();
  if (device_ != nullptr) {
    if (n_routers() == 0) return;
    const std::vector<double> losses = device_->router_losses(first);
    for (std::size_t i = 0; i < losses.size(); ++i) {
      if (auto* moe = converted[i].moe()) moe->router.scale = std::max(1e-30, losses[i]);
    }
    return;
  }
  model_.gradients(window(first), teacher_->hidden(first), options_.n_ctx);
  for (auto& c : converted) {
    if (auto* moe = c.moe()) moe->router.scale = std::max(1e-30, moe->auxiliary);
  }
  clear_gradients();
}

void Trainer::clear_gradients() {
  for (auto& c : model_.converted()) {
    for (const TrainedTensor<float>& t : c.tensors()) {
      std::fill(t.gradient.begin(), t.gradient.end(), 0.0F);
    }
  }
  for (int l = 0; l < model_.n_layers(); ++l) {
    for (LowRankUpdate<Bfloat16>& update : model_.attention(l).updates()) {
      for (const std::span<float> g : {update.a_gradient(), update.b_gradient()}) {
        std::fill(g.begin(), g.end(), 0.0F);
      }
    }
  }
}

double Trainer::schedule_of(std::int64_t step) const {
  const auto warm_up = static_cast<std::int64_t>(options_.warm_up * static_cast<double>(n_steps()));
  return cosine_schedule(step, n_steps(), warm_up);
}

void Trainer::check_loss(double kl) const {
  require<Error>(std::isfinite(kl), "recovery: step {}: the loss is NaN or infinite", step_ + 1);
}

void Trainer::check_gradient(const Trained& tensor, double square) const {
  require<Error>(std::isfinite(square),
                 "recovery: step {}: the gradient of layer {}, {}, is NaN or infinite; a lower "
                 "learning rate may help",
                 step_ + 1, tensor.layer, tensor.name);
}

double Trainer::gradient_norm(bool routers) {
  double total = 0;
  for (const Trained& tensor : tensors_) {
    if (tensor.router != routers) continue;
    const std::span<const float> g = tensor.adam.gradient();
    const int n_threads = ctx_.pool.n_threads();
    std::vector<double> parts(static_cast<std::size_t>(n_threads));
    ctx_.pool.run([&](int thread) {
      const Range range = split(static_cast<std::int64_t>(g.size()), n_threads, thread, 16);
      double sum = 0;
      for (std::int64_t first = range.begin; first < range.end; first += 256) {
        float lanes[8] = {};
        const std::int64_t end = std::min(range.end, first + 256);
        for (std::int64_t j = first; j < end; ++j) {
          lanes[j % 8] += g[static_cast<std::size_t>(j)] * g[static_cast<std::size_t>(j)];
        }
        for (const float lane : lanes) sum += static_cast<double>(lane);
      }
      parts[static_cast<std::size_t>(thread)] = sum;
    });
    const double square = std::accumulate(parts.begin(), parts.end(), 0.0);
    check_gradient(tensor, square);
    total += square;
  }
  return std::sqrt(total);
}

void Trainer::refit_routers() {
  std::vector<std::size_t> layers;
  for (const auto& [index, moments] : moments_) layers.push_back(index);
  for_each_row(ctx_, static_cast<std::int64_t>(layers.size()), [&](std::int64_t i, int) {
    const std::size_t index = layers[static_cast<std::size_t>(i)];
    moments_.at(index).refit(options_.refit_ridge, *model_.converted()[index].moe()->parameters);
  });
  for (Trained& t : tensors_) {
    if (t.router) t.adam.reset();
  }
}

// Moves each threshold vector of the self-routed layers towards the share that it shall leave.
void Trainer::follow_shares() {
  for (auto& c : model_.converted()) {
    auto* routed = c.self_routed();
    if (routed == nullptr) continue;
    const SelfRoutedTriple shares = routed->seen.shares(routed->layer.shape());
    SelfRoutedTriple& factors = routed->layer.factors();
    for (std::size_t v = 0; v < factors.size(); ++v) {
      factors[v] *=
          std::exp(static_cast<float>(options_.threshold_gain) * (shares[v] - routed->target[v]));
    }
  }
}

StepResult Trainer::step_on_device() {
  put();
  if (step_ == 0) measure_router_scale();
  const double schedule = schedule_of(step_);
  std::vector<AdamTensor::Step> steps;
  for (Trained& t : tensors_) steps.push_back(t.adam.count_step(schedule));
  model_.forget_counts();
  const DeviceTraining::Outcome outcome = device_->step(windows_of_step(step_), steps);
  device_ahead_ = true;
  StepResult result;
  result.kl = outcome.kl / static_cast<double>(options_.batch);
  check_loss(result.kl);
  double square = 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    check_gradient(tensors_[i], outcome.squares[i]);
    if (!tensors_[i].router) square += outcome.squares[i];
  }
  for (const double loss : outcome.auxiliary) {
    result.auxiliary += loss / static_cast<double>(std::max<std::ptrdiff_t>(1, n_routers()));
  }
  result.gradient_norm = std::sqrt(square);
  follow_shares();
  ++step_;
  return result;
}

StepResult Trainer::step() {
  if (device_ != nullptr) return step_on_device();
  if (step_ == 0) measure_router_scale();
  const std::vector<std::int64_t> windows = windows_of_step(step_);
  const std::int64_t per_part = options_.part / options_.n_ctx;
  const std::int64_t d = model_.head().cols;
  StepResult result;
  model_.forget_counts();
  std::vector<std::int32_t> tokens;
  for (std::size_t first = 0; first < windows.size(); first += static_cast<std::size_t>(per_part)) {
    const std::size_t end = std::min(windows.size(), first + static_cast<std::size_t>(per_part));
    const auto rows = static_cast<std::int64_t>(end - first) * options_.n_ctx;
    const Workspace::Scope scope(ctx_.workspace);
    const auto hidden = take_matrix<std::uint16_t>(ctx_, rows, d);
    tokens.clear();
    for (std::size_t i = first; i < end; ++i) {
      const auto ids = window(windows[i]);
      const auto states = teacher_->hidden(windows[i]);
      std::copy_n(states.data, states.rows * d,
                  hidden.row(static_cast<std::int64_t>(tokens.size())));
      tokens.insert(tokens.end(), ids.begin(), ids.end());
    }
    const auto losses = model_.gradients(tokens, hidden, options_.batch);
    result.kl += losses.kl;
    result.auxiliary += losses.auxiliary;
  }
  const auto start = std::chrono::steady_clock::now();
  gather_scales();
  result.kl /= static_cast<double>(options_.batch);
  check_loss(result.kl);
  result.gradient_norm = gradient_norm(false);
  gradient_norm(true);  // for its check
  const double scale = options_.clip > 0 && result.gradient_norm > options_.clip
                           ? options_.clip / result.gradient_norm
                           : 1;
  const double schedule = schedule_of(step_);
  for (Trained& t : tensors_) {
    t.adam.step(ctx_, schedule, t.router ? 1 : scale);
  }
  clear_gradients();
  scatter_scales();
  follow_shares();
  ++step_;
  const bool last = step_ == n_steps();
  if (options_.refit_every > 0 && (step_ % options_.refit_every == 0 || last)) refit_routers();
  model_.refresh();
  optimizer_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

Judgement Trainer::judge() {
  put();
  model_.forget_counts();
  double sum = 0;
  for (std::int64_t w = n_train_; w < n_windows_; ++w) {
    sum += device_ ? device_->divergence(w) : model_.divergence(window(w), teacher_->hidden(w));
  }
  return {.kl = sum / static_cast<double>((n_windows_ - n_train_) * options_.n_ctx),
          .active = model_.active_fraction()};
}

std::vector<Trainer::Named> Trainer::state() {
  std::vector<Named> all;
  for (Trained& t : tensors_) {
    const std::string name = fmt::format("blk.{}.{}", t.layer, t.name);
    all.push_back({name + ".value", t.adam.value()});
    all.push_back({name + ".m", t.adam.first_moment()});
    all.push_back({name + ".v", t.adam.second_moment()});
  }
  for (auto& [index, moments] : moments_) {
    const std::string name = fmt::format("blk.{}.router", model_.converted()[index].layer);
    all.push_back({name + ".xx", moments.xx()});
    all.push_back({name + ".xc", moments.xc()});
  }
  for (auto& c : model_.converted()) {
    if (auto* routed = c.self_routed()) {
      all.push_back({fmt::format("blk.{}.threshold.factors", c.layer), routed->layer.factors()});
    }
  }
  std::erase_if(all, [](const Named& n) { return n.values.empty(); });
  return all;
}

void Trainer::save(const std::filesystem::path& path, std::string note) {
  fetch();
  using models::GgufValue;
  models::GgufWriter writer;
  writer.set(std::string(kKeyStep), GgufValue::u64(static_cast<std::uint64_t>(step_)));
  writer.set(std::string(kKeyNote), GgufValue::string(std::move(note)));
  std::vector<std::uint64_t> steps;
  for (const Trained& t : tensors_) steps.push_back(static_cast<std::uint64_t>(t.adam.steps()));
  writer.set(std::string(kKeyAdamSteps), GgufValue::u32_array(std::move(steps)));
  // As text: doubles, exactly.
  std::vector<std::string> scales;
  for (auto& c : model_.converted()) {
    scales.push_back(fmt::format("{:a}", c.moe() != nullptr ? c.moe()->router.scale : 1.0));
  }
  writer.set(std::string(kKeyRouterScale), GgufValue::string_array(std::move(scales)));
  for (const Named& n : state()) {
    writer.add_tensor(n.name, DType::F32, {static_cast<std::int64_t>(n.values.size())},
                      std::as_bytes(n.values));
  }
  writer.write(path);
}

std::string Trainer::load(const std::filesystem::path& path) {
  const auto file = models::GgufFile::open(path);
  const std::int64_t step = file->get_int(kKeyStep);
  const std::vector<std::int64_t> steps = file->get_ints(kKeyAdamSteps);
  const std::vector<std::string> scales = file->get_strings(kKeyRouterScale);
  require<FormatError>(
      steps.size() == tensors_.size() && scales.size() == model_.converted().size(),
      "{}: holds {} tensors of {} layers, expected {} of {}", path.string(), steps.size(),
      scales.size(), tensors_.size(), model_.converted().size());
  for (const Named& n : state()) {
    const std::array dims = {static_cast<std::int64_t>(n.values.size())};
    std::memcpy(n.values.data(), file->expect(n.name, dims).data, n.values.size_bytes());
  }
  for (std::size_t i = 0; i < tensors_.size(); ++i) tensors_[i].adam.set_steps(steps[i]);
  for (std::size_t i = 0; i < scales.size(); ++i) {
    if (auto* moe = model_.converted()[i].moe()) {
      moe->router.scale = std::strtod(scales[i].c_str(), nullptr);
    }
  }
  step_ = step;
  scatter_scales();
  model_.refresh();
  device_ahead_ = false;
  host_ahead_ = true;
  return file->get_string(kKeyNote);
}

}  // namespace moesaic::converter
