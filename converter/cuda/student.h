#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "converter/distill.h"
#include "kernels/cuda/base/arena.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/training/experts.h"

namespace moesaic::converter {

/// A student on a GPU and what a batch needs beside it. Work is queued on one stream and nothing
/// waits.
class CudaStudent {
 public:
  /// Takes the student over to the current device, with room for batches of `rows`; waits for the
  /// copies. Throws DeviceError.
  CudaStudent(const Student& student, std::int64_t rows, cuda::Blas& blas,
              const cuda::Stream& stream);

  /// The parameters back, once the stream was synchronised.
  void fetch(Student& student);

  struct Tensor {
    std::span<float> value, gradient;
  };
  /// As tensors() of the host's (distill.h).
  const std::array<Tensor, kStudentTensors>& tensors() const { return tensors_; }

  /// student_gradients() of a batch in device memory, added to the gradients; losses [2], output
  /// and auxiliary, are added to.   x, y [m, d_model], weight [m], Σ weight = total_weight
  void gradients(ConstMatrix x, ConstMatrix y, const float* weight, double total_weight,
                 const LossScales& scales, double auxiliary, double* losses);

 private:
  enum Which : std::size_t { kGate, kUp, kDown, kBias, kQ, kP, kV, kU, kRouterBias };
  void take_memory(const Student& student);
  void put(const Student& student);
  ConstMatrix value(Which which) const;
  Matrix gradient(Which which) const;

  cuda::Blas& blas_;
  const cuda::Stream& stream_;
  kernels::Activation phi_;
  LayerPlan plan_;
  std::int64_t rows_, d_model_, n_neurons_, n_experts_;
  std::array<std::int64_t, kStudentTensors> columns_;
  std::array<Tensor, kStudentTensors> tensors_;
  std::span<float> mean_, norm_;                      // [neurons]
  std::span<std::int32_t> family_, begin_, members_;  // of clones (experts.h)
  std::span<float> gate_, up_, f_;                    // [rows, neurons]
  std::span<float> z_, scores_, gap_, y_hat_, qx_;    // [rows, rank, n_experts twice, d_model, …]
  std::span<std::uint8_t> mask_;                      // [rows, n_experts]
  std::span<std::int32_t> ids_;                       // [rows, n_active]
  std::span<double> squared_;                         // [rows]
  std::unique_ptr<cuda::Arena> arena_;
};

}  // namespace moesaic::converter
