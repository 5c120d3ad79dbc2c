#include "converter/cuda/distillation.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "converter/adam.h"
#include "converter/cuda/student.h"
#include "converter/recovery/cuda/memory.h"
#include "kernels/base/error.h"
#include "kernels/cuda/base/device.h"
#include "kernels/cuda/base/pinned_buffer.h"
#include "kernels/cuda/training/adam.h"

namespace moesaic::converter {
namespace {

// Steps queued before the host waits for them: enough that the device never waits for the host, few
// enough (some milliseconds) that who interrupts does not.
constexpr std::int64_t kAhead = 8;

// A layer on its way: the sample, batches of it, the student, Adam.
class CudaLayer {
 public:
  CudaLayer(const Student& student, const LayerSample& sample, const LossScales& scales,
            const DistillOptions& options, cuda::Blas& blas, const cuda::Stream& stream);

  void queue_step(std::int64_t step);
  double wait();  // the last step's output loss
  void fetch(Student& student);

 private:
  void put(const LayerSample& sample);

  const DistillOptions& options_;
  const cuda::Stream& stream_;
  LossScales scales_;
  std::int64_t batch_, n_fit_, n_steps_;
  std::span<const float> host_weight_;
  BatchOrder order_;
  CudaStudent student_;
  std::vector<AdamClock> clocks_;
  std::vector<std::span<float>> first_moments_, second_moments_;
  std::span<float> all_x_, all_y_, all_weight_;  // of the fitted rows
  std::span<float> x_, y_, weight_;              // of the batch
  std::span<std::int32_t> ids_;                  // [batch]
  std::span<double> losses_;                     // [2]
  std::span<float> one_;
  std::unique_ptr<cuda::Arena> arena_;
  cuda::PinnedBuffer<std::int32_t> host_ids_;  // [kAhead, batch]
  cuda::PinnedBuffer<double> host_losses_;
};

CudaLayer::CudaLayer(const Student& student, const LayerSample& sample, const LossScales& scales,
                     const DistillOptions& options, cuda::Blas& blas, const cuda::Stream& stream)
    : options_(options),
      stream_(stream),
      scales_(scales),
      batch_(std::min(options.batch, sample.n_fit)),
      n_fit_(sample.n_fit),
      n_steps_(distill_steps(options, sample.n_fit)),
      host_weight_(sample.weight),
      order_(n_fit_, batch_, options.seed),
      student_(student, batch_, blas, stream),
      first_moments_(kStudentTensors),
      second_moments_(kStudentTensors),
      host_ids_(static_cast<std::size_t>(kAhead * batch_)),
      host_losses_(2) {
  const auto values = tensors(student);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    clocks_.emplace_back(values[i],
                         i < kFirstStudentRouter ? options.learning_rate : options.router_rate);
  }
  const std::int64_t d = sample.x.cols;
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    for (auto* part : {&all_x_, &all_y_}) take(*part, n_fit_ * d);
    take(all_weight_, n_fit_);
    for (auto* part : {&x_, &y_}) take(*part, batch_ * d);
    take(weight_, batch_);
    take(ids_, batch_);
    take(losses_, 2);
    take(one_, 1);
    for (std::size_t i = 0; i < kStudentTensors; ++i) {
      for (auto* part : {&first_moments_[i], &second_moments_[i]}) {
        take(*part, std::ssize(values[i]));
      }
    }
  });
  put(sample);
}

void CudaLayer::put(const LayerSample& sample) {
  for (const ConstMatrix& m : {sample.x, sample.y}) {
    require<ShapeError>(m.stride == m.cols,
                        "distillation: a sample in rows of {}, {} apart, expected no gaps", m.cols,
                        m.stride);
  }
  copy_in<float>({sample.x.data, all_x_.size()}, all_x_, stream_);
  copy_in<float>({sample.y.data, all_y_.size()}, all_y_, stream_);
  copy_in<float>(sample.weight.first(all_weight_.size()), all_weight_, stream_);
  const float one = 1;
  copy_in<float>({&one, 1}, one_, stream_);
  for (const auto* moments : {&first_moments_, &second_moments_}) {
    for (const std::span<float> part : *moments) zero(part, stream_);
  }
  stream_.synchronize();
}

void CudaLayer::queue_step(std::int64_t step) {
  const std::int64_t d = std::ssize(x_) / batch_;
  const std::span<const std::int32_t> rows = order_.next();
  const auto slot = host_ids_.span().subspan(static_cast<std::size_t>(step % kAhead * batch_),
                                             static_cast<std::size_t>(batch_));
  std::ranges::copy(rows, slot.begin());
  copy_in<std::int32_t>(slot, ids_, stream_);
  cuda::gather_rows(view<const float>(all_x_, n_fit_, d), ids_.data(), view(x_, batch_, d),
                    stream_);
  cuda::gather_rows(view<const float>(all_y_, n_fit_, d), ids_.data(), view(y_, batch_, d),
                    stream_);
  cuda::gather_rows(view<const float>(all_weight_, n_fit_, 1), ids_.data(),
                    view(weight_, batch_, 1), stream_);
  const double total_weight =
      std::accumulate(rows.begin(), rows.end(), 0.0, [&](double sum, std::int32_t row) {
        return sum + host_weight_[static_cast<std::size_t>(row)];
      });
  zero(losses_, stream_);
  student_.gradients(view(x_, batch_, d), view(y_, batch_, d), weight_.data(), total_weight,
                     scales_, options_.auxiliary, losses_.data());
  const double schedule = distill_schedule(step, n_steps_);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    const CudaStudent::Tensor& tensor = student_.tensors()[i];
    const AdamClock::Step now = clocks_[i].count_step(schedule);
    cuda::adam({now.correction1, now.correction2, now.rate}, one_.data(), std::ssize(tensor.value),
               tensor.value.data(), tensor.gradient.data(), first_moments_[i].data(),
               second_moments_[i].data(), stream_);
  }
}

double CudaLayer::wait() {
  copy_out<double>(losses_, host_losses_.span(), stream_);
  stream_.synchronize();
  return host_losses_.span()[0];
}

void CudaLayer::fetch(Student& student) {
  student_.fetch(student);
  stream_.synchronize();
}

class CudaDistillation : public DeviceDistillation {
 public:
  explicit CudaDistillation(int device) : device_(device) {}

  void distill(Context& ctx, Student& student, const LayerSample& sample,
               const DistillOptions& options, engine::Monitor& monitor) override {
    const std::int64_t steps = distill_steps(options, sample.n_fit);
    if (steps == 0) return;
    monitor.check();
    cuda::use_device(device_.index);
    CudaLayer layer(student, sample, loss_scales(ctx, student, sample), options, blas_, stream_);
    for (std::int64_t step = 0; step < steps;) {
      monitor.check();  // nothing is under way now
      for (const std::int64_t end = std::min(steps, step + kAhead); step < end; ++step) {
        layer.queue_step(step);
      }
      const double loss = layer.wait();
      monitor.advance(step, fmt::format("error {:.4f}", loss));
    }
    layer.fetch(student);
  }

 private:
  cuda::MadeOn device_;
  cuda::Stream stream_;
  cuda::Blas blas_{stream_};
};

}  // namespace

MakeDeviceDistillation cuda_distillation(int device) {
  return [device] { return std::make_unique<CudaDistillation>(device); };
}

}  // namespace moesaic::converter
