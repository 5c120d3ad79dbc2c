#include "converter/recovery/cuda/training.h"

#include <algorithm>
#include <numeric>

#include "converter/recovery/cuda/hybrid.h"
#include "kernels/base/error.h"
#include "kernels/cuda/base/device.h"
#include "kernels/cuda/base/pinned_buffer.h"
#include "kernels/cuda/training/adam.h"
#include "kernels/cuda/training/block_scales.h"

namespace moesaic::converter {
namespace {

// One tensor under Adam. Squares stand with the routers' last, which are not clipped.
struct Learns {
  AdamTensor* host;
  std::span<float> value, gradient, m, v;
  bool router;
  std::size_t square;  // its place
};

// A matrix whose scales learn.
struct Scaled {
  std::span<float> weights, weight_gradient;  // of the model
  std::span<std::int8_t> codes;
  std::span<float> scale, offset, scale_gradient, offset_gradient;  // [blocks]; offsets or none
  BlockScales* host;
};

class CudaTraining : public DeviceTraining {
 public:
  CudaTraining(const TrainingParts& parts, int device);

  void put() override;
  void fetch() override;
  Outcome step(std::span<const std::int64_t> windows,
               std::span<const AdamTensor::Step> steps) override;
  double divergence(std::int64_t window) override;
  std::vector<double> router_losses(std::int64_t window) override;

 private:
  void take_memory();
  void clear_sums();
  void queue_texts(std::span<const std::int64_t> windows);
  void keep_texts(std::span<const std::int64_t> windows);
  void queue_update(std::span<const AdamTensor::Step> steps);
  double finish(std::int64_t rows);

  TrainingParts parts_;
  cuda::MadeOn device_;
  cuda::Stream stream_;
  cuda::Blas blas_{stream_};
  std::int64_t d_model_;
  CudaScratch scratch_;
  CudaHybrid teacher_, student_;
  std::vector<Learns> tensors_;
  std::vector<Scaled> scaled_;
  std::span<std::int32_t> ids_;      // [batch]
  std::span<std::uint16_t> hidden_;  // [batch, d_model] the teacher's
  std::span<double> kl_, squares_;   // [1], [n tensors]
  std::int64_t n_clipped_ = 0;       // the first of the squares
  std::span<double> square_parts_;   // square_sum()'s workspace
  std::span<float> clip_;            // [2] of clipped tensors and the others
  std::unique_ptr<cuda::Arena> arena_;
  cuda::PinnedBuffer<std::int32_t> host_ids_;
  cuda::PinnedBuffer<std::uint16_t> host_hidden_;
  cuda::PinnedBuffer<double> host_results_;  // kl, squares, auxiliary
  cuda::PinnedBuffer<cuda::Count> host_counts_;
  std::vector<std::vector<std::uint16_t>> kept_;  // per window, empty until asked for
};

CudaTraining::CudaTraining(const TrainingParts& parts, int device)
    : parts_(parts),
      device_(device),
      d_model_(parts.hybrid->config.d_model),
      scratch_(*parts.hybrid, parts.part, parts.n_ctx, CudaWork::Training),
      teacher_(*parts.dense, nullptr, false, scratch_, blas_, stream_),
      student_(*parts.hybrid, parts.model, parts.recompute, scratch_, blas_, stream_),
      kept_(parts.tokens.size() / static_cast<std::size_t>(parts.n_ctx)) {
  const models::ModelConfig &a = teacher_.config(), &b = student_.config();
  require<InputError>(a.d_model == b.d_model && a.d_ff == b.d_ff && a.n_heads == b.n_heads &&
                          a.n_kv_heads == b.n_kv_heads && a.head_dim == b.head_dim,
                      "recovery: the dense model and the hybrid have different sizes");
  take_memory();
  for (const Scaled& s : scaled_) {
    const auto codes = s.host->codes();
    cuda::copy_bytes_in(bytes(s.codes), codes.data(), codes.size_bytes(), stream_);
  }
  put();
}

void CudaTraining::take_memory() {
  const auto n_tensors = static_cast<std::int64_t>(parts_.tensors.size());
  scaled_.resize(parts_.scaled.size());
  for (std::size_t i = 0; i < scaled_.size(); ++i) {
    const TrainingParts::Scaled& from = parts_.scaled[i];
    const CudaTensor& matrix = student_.converted()[from.converted].tensors[from.matrix];
    scaled_[i].host = from.scales;
    scaled_[i].weights = matrix.value;
    scaled_[i].weight_gradient = matrix.gradient;
  }
  tensors_.resize(parts_.tensors.size());
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    take(ids_, parts_.batch);
    take(hidden_, parts_.batch * d_model_);
    take(kl_, 1);
    take(squares_, n_tensors);
    take(square_parts_, cuda::kSquareSumParts);
    take(clip_, 2);
    for (Scaled& s : scaled_) {
      take(s.codes, std::ssize(s.host->codes()));
      for (auto* part : {&s.scale, &s.scale_gradient}) take(*part, std::ssize(s.host->scale()));
      for (auto* part : {&s.offset, &s.offset_gradient}) take(*part, std::ssize(s.host->offset()));
    }
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      tensors_[i].host = parts_.tensors[i];
      for (auto* part : {&tensors_[i].m, &tensors_[i].v}) {
        take(*part, std::ssize(parts_.tensors[i]->value()));
      }
    }
  });
  // In the trainer's order.
  std::vector<std::pair<std::span<float>, std::span<float>>> learns;
  for (const Scaled& s : scaled_) {
    learns.emplace_back(s.scale, s.scale_gradient);
    if (!s.offset.empty()) learns.emplace_back(s.offset, s.offset_gradient);
  }
  if (!parts_.learns_scales) {
    for (const CudaConverted& layer : student_.converted()) {
      for (const CudaTensor& t : layer.tensors) learns.emplace_back(t.value, t.gradient);
    }
  }
  require<ShapeError>(learns.size() == tensors_.size(), "recovery: {} tensors on CUDA, {} given",
                      learns.size(), tensors_.size());
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    require<ShapeError>(learns[i].first.size() == tensors_[i].host->value().size(),
                        "recovery: tensor {} of {} elements on CUDA, {} given", i,
                        learns[i].first.size(), tensors_[i].host->value().size());
    tensors_[i].value = learns[i].first;
    tensors_[i].gradient = learns[i].second;
    tensors_[i].router = parts_.routers[i];
  }
  std::size_t place = 0;
  for (const bool routers : {false, true}) {
    for (Learns& t : tensors_) {
      if (t.router == routers) t.square = place++;
    }
    if (!routers) n_clipped_ = static_cast<std::int64_t>(place);
  }
  host_ids_ = cuda::PinnedBuffer<std::int32_t>(ids_.size());
  host_hidden_ = cuda::PinnedBuffer<std::uint16_t>(hidden_.size());
  host_results_ = cuda::PinnedBuffer<double>(1 + squares_.size() + student_.auxiliary().size());
  host_counts_ = cuda::PinnedBuffer<cuda::Count>(student_.counts().size());
}

void CudaTraining::put() {
  student_.put();
  for (const Learns& t : tensors_) {
    const auto copy = [&](std::span<const float> from, std::span<float> to) {
      cuda::copy_bytes_in(bytes(to), from.data(), from.size_bytes(), stream_);
    };
    copy(t.host->first_moment(), t.m);
    copy(t.host->second_moment(), t.v);
    if (parts_.learns_scales) copy(t.host->value(), t.value);  // else the model's own
  }
  for (const Scaled& s : scaled_) {
    cuda::scatter_scales(s.codes.data(), s.scale.data(),
                         s.offset.empty() ? nullptr : s.offset.data(), std::ssize(s.scale),
                         s.weights.data(), stream_);
  }
  student_.refresh();
  stream_.synchronize();
}

void CudaTraining::fetch() {
  student_.fetch();
  for (const Learns& t : tensors_) {
    const auto copy = [&](std::span<const float> from, std::span<float> to) {
      cuda::copy_bytes_out(to.data(), bytes(from), to.size_bytes(), stream_);
    };
    copy(t.m, t.host->first_moment());
    copy(t.v, t.host->second_moment());
    if (parts_.learns_scales) copy(t.value, t.host->value());
  }
  stream_.synchronize();
  parts_.model->refresh();
}

// Tokens of windows, and what the teacher makes of them: from the host, where it was asked before.
// One window at a time, so that what it gives does not depend on its neighbours.
void CudaTraining::queue_texts(std::span<const std::int64_t> windows) {
  const auto n = static_cast<std::size_t>(parts_.n_ctx),
             row = n * static_cast<std::size_t>(d_model_);
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const auto tokens = parts_.tokens.subspan(static_cast<std::size_t>(windows[i]) * n, n);
    std::copy(tokens.begin(), tokens.end(),
              host_ids_.span().begin() + static_cast<std::ptrdiff_t>(i * n));
  }
  cuda::copy_bytes_in(bytes(ids_), host_ids_.span().data(),
                      windows.size() * n * sizeof(std::int32_t), stream_);
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const std::vector<std::uint16_t>& kept = kept_[static_cast<std::size_t>(windows[i])];
    const auto on_host = host_hidden_.span().subspan(i * row, row);
    const auto on_device = hidden_.subspan(i * row, row);
    if (kept.empty()) {
      teacher_.hidden(ids_.subspan(i * n, n), on_device.data());
      cuda::copy_bytes_out(on_host.data(), bytes(on_device), on_host.size_bytes(), stream_);
    } else {
      std::copy(kept.begin(), kept.end(), on_host.begin());
      cuda::copy_bytes_in(bytes(on_device), on_host.data(), on_host.size_bytes(), stream_);
    }
  }
}

// What the teacher made, once the stream was synchronised.
void CudaTraining::keep_texts(std::span<const std::int64_t> windows) {
  const auto row = static_cast<std::size_t>(parts_.n_ctx * d_model_);
  for (std::size_t i = 0; i < windows.size(); ++i) {
    std::vector<std::uint16_t>& kept = kept_[static_cast<std::size_t>(windows[i])];
    const auto on_host = host_hidden_.span().subspan(i * row, row);
    if (kept.empty()) kept.assign(on_host.begin(), on_host.end());
  }
}

// Of what comes back.
void CudaTraining::clear_sums() {
  for (const auto part : {kl_, squares_, student_.auxiliary()}) zero(part, stream_);
  zero(student_.counts(), stream_);
}

void CudaTraining::queue_update(std::span<const AdamTensor::Step> steps) {
  for (const Scaled& s : scaled_) {
    cuda::gather_scales(s.codes.data(), s.weight_gradient.data(), std::ssize(s.scale),
                        s.scale_gradient.data(),
                        s.offset.empty() ? nullptr : s.offset_gradient.data(), stream_);
  }
  for (const Learns& t : tensors_) {
    cuda::square_sum(t.gradient.data(), std::ssize(t.gradient), square_parts_.data(),
                     squares_.data() + t.square, stream_);
  }
  cuda::clip_scale(squares_.data(), n_clipped_, std::ssize(squares_), parts_.clip, clip_.data(),
                   stream_);
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Learns& t = tensors_[i];
    cuda::adam({steps[i].correction1, steps[i].correction2, steps[i].rate},
               clip_.data() + (t.router ? 1 : 0), std::ssize(t.value), t.value.data(),
               t.gradient.data(), t.m.data(), t.v.data(), stream_);
  }
  if (parts_.learns_scales) student_.clear_gradients();
  for (const Scaled& s : scaled_) {
    cuda::scatter_scales(s.codes.data(), s.scale.data(),
                         s.offset.empty() ? nullptr : s.offset.data(), std::ssize(s.scale),
                         s.weights.data(), stream_);
  }
  student_.refresh();
}

// Waits for all that was queued; adds the counts of `rows` tokens to the host's.
double CudaTraining::finish(std::int64_t rows) {
  const std::span<double> results = host_results_.span();
  const std::span<cuda::Count> counts = host_counts_.span();
  cuda::copy_bytes_out(results.data(), bytes(kl_), sizeof(double), stream_);
  cuda::copy_bytes_out(results.data() + 1, bytes(squares_), squares_.size_bytes(), stream_);
  const std::span<double> auxiliary = student_.auxiliary();
  cuda::copy_bytes_out(results.data() + 1 + squares_.size(), bytes(auxiliary),
                       auxiliary.size_bytes(), stream_);
  cuda::copy_bytes_out(counts.data(), bytes(student_.counts()), counts.size_bytes(), stream_);
  stream_.synchronize();
  const auto count = [&](std::size_t i) { return static_cast<std::int64_t>(counts[i]); };
  for (std::size_t i = 0; i < student_.converted().size(); ++i) {
    auto* routed = student_.converted()[i].host->self_routed();
    if (routed == nullptr) continue;
    routed->seen.add({.tokens = rows,
                      .inputs = count(3 * i),
                      .routed = count(3 * i + 1),
                      .kept = count(3 * i + 2)});
  }
  return results[0];
}

DeviceTraining::Outcome CudaTraining::step(std::span<const std::int64_t> windows,
                                           std::span<const AdamTensor::Step> steps) {
  const std::int64_t rows = std::ssize(windows) * parts_.n_ctx;
  require<ShapeError>(rows <= parts_.batch && steps.size() == tensors_.size(),
                      "recovery: a step of {} tokens and {} tensors, expected at most {} and {}",
                      rows, steps.size(), parts_.batch, tensors_.size());
  clear_sums();
  queue_texts(windows);
  for (std::int64_t first = 0; first < rows; first += parts_.part) {
    const auto n = static_cast<std::size_t>(std::min(parts_.part, rows - first));
    student_.gradients(ids_.subspan(static_cast<std::size_t>(first), n),
                       hidden_.data() + first * d_model_, parts_.batch, kl_.data());
  }
  queue_update(steps);
  Outcome outcome;
  outcome.kl = finish(rows);
  keep_texts(windows);
  const std::span<const double> results = host_results_.span();
  for (const Learns& t : tensors_) outcome.squares.push_back(results[1 + t.square]);
  const auto auxiliary = results.subspan(1 + squares_.size());
  outcome.auxiliary.assign(auxiliary.begin(), auxiliary.end());
  return outcome;
}

std::vector<double> CudaTraining::router_losses(std::int64_t window) {
  clear_sums();
  queue_texts({&window, 1});
  student_.gradients(ids_.first(static_cast<std::size_t>(parts_.n_ctx)), hidden_.data(),
                     parts_.n_ctx, kl_.data());
  student_.clear_gradients();
  finish(parts_.n_ctx);
  keep_texts({&window, 1});
  const auto auxiliary = host_results_.span().subspan(1 + squares_.size());
  return {auxiliary.begin(), auxiliary.end()};
}

double CudaTraining::divergence(std::int64_t window) {
  clear_sums();
  queue_texts({&window, 1});
  student_.divergence(ids_.first(static_cast<std::size_t>(parts_.n_ctx)), hidden_.data(),
                      kl_.data());
  const double kl = finish(parts_.n_ctx);
  keep_texts({&window, 1});
  return kl;
}

}  // namespace

MakeDeviceTraining cuda_training(int device) {
  return [device](const TrainingParts& parts) {
    return std::make_unique<CudaTraining>(parts, device);
  };
}

}  // namespace moesaic::converter
