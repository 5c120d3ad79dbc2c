#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "converter/adam.h"
#include "converter/recovery/block_scales.h"
#include "converter/recovery/device_training.h"
#include "converter/recovery/hybrid.h"
#include "converter/recovery/options.h"
#include "converter/recovery/router_refit.h"
#include "converter/recovery/teacher.h"

namespace moesaic::converter {

/// What one step gave, per trained token.
struct StepResult {
  double kl = 0;
  double auxiliary = 0;      // routers' regression loss over what it was at the start
  double gradient_norm = 0;  // of all but the routers, before clipping
};

/// A judgement on the held-out windows.
struct Judgement {
  double kl = 0;      // mean divergence from the teacher, nats a token
  double active = 0;  // multiply-adds of the MLPs over the dense ones', mean over layers
};

/// Recovery step by step. Deterministic for a seed and thread count: a training that was saved and
/// loaded goes on bit for bit as if it never stopped.
class Trainer {
 public:
  /// `tokens` [n_windows · n_ctx] borrowed; the last options.held_out tokens' windows (a quarter of
  /// all at most, one at least) are never trained on. Throws InputError if there are fewer windows
  /// than two, sizes that do not fit each other, or something to train that options.device does not
  /// know. With Learns::Scales `hybrid` keeps its codes,
  /// and trains on options.scale_tokens at options.scale_rate.
  Trainer(std::shared_ptr<const models::Checkpoint> dense, const models::Checkpoint& hybrid,
          Context& ctx, std::span<const std::int32_t> tokens, const RecoverOptions& options,
          Learns learns = Learns::Weights);

  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  std::int64_t n_steps() const {
    return (learns_ == Learns::Scales ? options_.scale_tokens : options_.tokens) / options_.batch;
  }
  std::int64_t step_index() const { return step_; }
  bool done() const { return step_ >= n_steps(); }

  /// One step of Adam. Throws Error naming layer and tensor where a gradient is NaN or infinite;
  /// the parameters are then as they were before the step.
  StepResult step();

  Judgement judge();

  /// The whole state and the caller's note, atomically; and back. load() returns the note, and
  /// throws FormatError if the file is of another training.
  void save(const std::filesystem::path& path, std::string note);
  std::string load(const std::filesystem::path& path);

  /// As the last step left it, wherever that ran; what is changed in it holds for the next.
  Hybrid<Bfloat16>& model();
  /// Of trainings on the CPU.
  Teacher& teacher() { return *teacher_; }
  /// Windows that are trained on: [0, n).
  std::int64_t n_train_windows() const { return n_train_; }
  std::span<const std::int32_t> window(std::int64_t index) const;
  double optimizer_seconds() const { return optimizer_seconds_; }
  /// The scales that learn of that matrix of a layer, or null; matrices by
  /// SelfRoutedParameters::kNames.
  const BlockScales* scales(int layer, std::size_t matrix) const;

 private:
  void add_weights(Converted<Bfloat16>& layer, AdamUnit unit);
  void add_attention(AdamUnit unit);
  void add_scales(Converted<Bfloat16>& layer, const models::Mlp& mlp, AdamUnit unit);
  void follow_shares();
  void clear_gradients();
  void gather_scales();
  void scatter_scales();
  std::vector<std::int64_t> windows_of_step(std::int64_t step) const;
  std::ptrdiff_t n_routers();
  void measure_router_scale();
  void make_device(const models::Checkpoint& dense, const models::Checkpoint& hybrid);
  void put();
  void fetch();
  StepResult step_on_device();
  double gradient_norm(bool routers);
  double schedule_of(std::int64_t step) const;
  void check_loss(double kl) const;
  void refit_routers();
  struct Named {
    std::string name;
    std::span<float> values;
  };
  std::vector<Named> state();

  RecoverOptions options_;
  Learns learns_;
  Context ctx_;
  std::span<const std::int32_t> tokens_;
  std::optional<Teacher> teacher_;  // unless the device has its own
  Hybrid<Bfloat16> model_;
  std::int64_t n_windows_, n_train_;
  struct Trained {
    int layer;
    std::string name;
    bool router;
    AdamTensor adam;
  };
  void check_gradient(const Trained& tensor, double square) const;
  std::vector<Trained> tensors_;  // of each converted layer, in order
  struct Scaled {
    int layer;
    std::size_t matrix;
    Matrix value, gradient;
    std::unique_ptr<BlockScales> scales;
  };
  std::vector<Scaled> scaled_;                      // with Learns::Scales
  std::unique_ptr<DeviceTraining> device_;          // or null: trained here
  bool host_ahead_ = false, device_ahead_ = false;  // of the other
  std::map<std::size_t, RouterMoments> moments_;  // by index of the layer, if routers are refitted
  std::int64_t step_ = 0;
  double optimizer_seconds_ = 0;
};

}  // namespace moesaic::converter
