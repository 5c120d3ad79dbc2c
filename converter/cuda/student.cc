#include "converter/cuda/student.h"

#include "converter/recovery/cuda/memory.h"
#include "kernels/base/error.h"
#include "kernels/cuda/training/gated_mlp.h"

namespace moesaic::converter {
namespace {

// Clones as the kernels read them: family of each expert, where each family's members begin, those.
struct Families {
  std::vector<std::int32_t> family, begin, members;

  explicit Families(const Student& s) {
    if (s.families.empty()) return;
    family.assign(static_cast<std::size_t>(s.n_experts()), -1);
    for (const std::vector<std::int32_t>& of : s.families) {
      for (const std::int32_t e : of) {
        family[static_cast<std::size_t>(e)] = static_cast<std::int32_t>(begin.size());
      }
      begin.push_back(static_cast<std::int32_t>(members.size()));
      members.insert(members.end(), of.begin(), of.end());
    }
    begin.push_back(static_cast<std::int32_t>(members.size()));
  }
};

}  // namespace

CudaStudent::CudaStudent(const Student& s, std::int64_t rows, cuda::Blas& blas,
                         const cuda::Stream& stream)
    : blas_(blas),
      stream_(stream),
      phi_(s.neurons.phi),
      plan_(s.plan),
      rows_(rows),
      d_model_(s.neurons.d_model),
      n_neurons_(s.neurons.n),
      n_experts_(s.n_experts()) {
  const std::int64_t d = d_model_, r = plan_.router_rank, q = plan_.bypass_rank;
  columns_ = {d, d, d, d, d, q, d, r, n_experts_};
  take_memory(s);
  put(s);
}

void CudaStudent::take_memory(const Student& s) {
  const auto values = converter::tensors(s);
  const Families families(s);
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    for (std::size_t i = 0; i < kStudentTensors; ++i) {
      for (auto* part : {&tensors_[i].value, &tensors_[i].gradient}) {
        take(*part, std::ssize(values[i]));
      }
    }
    for (auto* part : {&mean_, &norm_}) take(*part, n_neurons_);
    take(family_, std::ssize(families.family));
    take(begin_, std::ssize(families.begin));
    take(members_, std::ssize(families.members));
    for (auto* part : {&gate_, &up_, &f_}) take(*part, rows_ * n_neurons_);
    take(z_, rows_ * plan_.router_rank);
    for (auto* part : {&scores_, &gap_}) take(*part, rows_ * n_experts_);
    take(mask_, rows_ * n_experts_);
    take(ids_, rows_ * plan_.n_active);
    take(y_hat_, rows_ * d_model_);
    take(qx_, rows_ * plan_.bypass_rank);
    take(squared_, rows_);
  });
}

void CudaStudent::put(const Student& s) {
  const auto values = converter::tensors(s);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    copy_in<float>(values[i], tensors_[i].value, stream_);
    zero(tensors_[i].gradient, stream_);
  }
  const Families families(s);
  copy_in<float>(s.mean.span(), mean_, stream_);
  copy_in<std::int32_t>(families.family, family_, stream_);
  copy_in<std::int32_t>(families.begin, begin_, stream_);
  copy_in<std::int32_t>(families.members, members_, stream_);
  stream_.synchronize();
}

void CudaStudent::fetch(Student& s) {
  const StudentTensors values = converter::tensors(s);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    copy_out<float>(tensors_[i].value, values[i], stream_);
  }
}

ConstMatrix CudaStudent::value(Which which) const {
  const std::span<float> part = tensors_[which].value;
  return {part.data(), std::ssize(part) / columns_[which], columns_[which]};
}

Matrix CudaStudent::gradient(Which which) const {
  const std::span<float> part = tensors_[which].gradient;
  return {part.data(), std::ssize(part) / columns_[which], columns_[which]};
}

void CudaStudent::gradients(ConstMatrix x, ConstMatrix y, const float* weight, double total_weight,
                            const LossScales& scales, double auxiliary, double* losses) {
  const std::int64_t m = x.rows, q = plan_.bypass_rank;
  require<ShapeError>(m <= rows_, "distillation: {} rows on CUDA, expected {} at most", m, rows_);
  const Matrix gate = view(gate_, m, n_neurons_), up = view(up_, m, n_neurons_);
  const Matrix f = view(f_, m, n_neurons_), z = view(z_, m, plan_.router_rank);
  const Matrix scores = view(scores_, m, n_experts_), gap = view(gap_, m, n_experts_);
  const Matrix y_hat = view(y_hat_, m, d_model_), qx = view(qx_, m, q);

  blas_.multiply(false, true, x, value(kGate), false, gate);
  blas_.multiply(false, true, x, value(kUp), false, up);
  blas_.multiply(false, true, x, value(kV), false, z);
  blas_.multiply(false, true, z, value(kU), false, scores);
  cuda::choose_experts(tensors_[kRouterBias].value.data(), plan_.n_active, scores, ids_.data(),
                       mask_.data(), stream_);
  cuda::row_norms(value(kDown), norm_.data(), stream_);
  const cuda::ExpertNeurons neurons{.phi = phi_,
                                    .n_shared = plan_.n_shared,
                                    .block = plan_.block,
                                    .mean = mean_.data(),
                                    .norm = norm_.data(),
                                    .family = family_.empty() ? nullptr : family_.data(),
                                    .begin = begin_.data(),
                                    .members = members_.data()};
  cuda::expert_slopes(neurons, gate, up, scores, mask_.data(),
                      cuda::ExpertTape<float>{.f = f.data,
                                              .slope_gate = gate.data,
                                              .slope_up = up.data,
                                              .gap = gap.data,
                                              .squared_gap = squared_.data()},
                      stream_);
  const double router_unit = 1 / (total_weight * scales.c);
  cuda::add_weighted(squared_.data(), weight, m, router_unit, losses + 1, stream_);
  cuda::score_gradients(weight, 2 * auxiliary * router_unit, gap, stream_);

  blas_.multiply(false, false, f, value(kDown), false, y_hat);
  if (q > 0) {
    blas_.multiply(false, true, x, value(kQ), false, qx);
    blas_.multiply(false, true, qx, value(kP), true, y_hat);
  }
  const double unit = 1 / (total_weight * scales.y);
  cuda::output_gradients(tensors_[kBias].value.data(), y, weight, 2 * unit, y_hat, squared_.data(),
                         stream_);
  cuda::add_weighted(squared_.data(), weight, m, unit, losses, stream_);

  const Matrix dy = y_hat;
  cuda::add_rows(dy, tensors_[kBias].gradient.data(), stream_);
  blas_.multiply(true, false, f, dy, true, gradient(kDown));
  const Matrix df = f;
  blas_.multiply(false, true, dy, value(kDown), false, df);
  cuda::scale_slopes(df.data, m * n_neurons_, gate.data, up.data, stream_);
  blas_.multiply(true, false, gate, x, true, gradient(kGate));
  blas_.multiply(true, false, up, x, true, gradient(kUp));
  if (q > 0) {
    blas_.multiply(true, false, dy, qx, true, gradient(kP));
    blas_.multiply(false, false, dy, value(kP), false, qx);  // qx is now ∂L/∂(Q x)
    blas_.multiply(true, false, qx, x, true, gradient(kQ));
  }
  cuda::add_rows(gap, tensors_[kRouterBias].gradient.data(), stream_);
  blas_.multiply(true, false, gap, z, true, gradient(kU));
  blas_.multiply(false, false, gap, value(kU), false, z);  // z is now ∂L/∂(V x)
  blas_.multiply(true, false, z, x, true, gradient(kV));
}

}  // namespace moesaic::converter
