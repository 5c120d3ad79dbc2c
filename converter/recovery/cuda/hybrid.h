#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "converter/recovery/cuda/decoder.h"
#include "converter/recovery/hybrid.h"

namespace moesaic::converter {

/// A converted layer under training: in float32 what changes, its operands beside it.
struct CudaSelfRouted {
  TrainedSelfRouted<Bfloat16>* host = nullptr;      // its factors hold here, too
  std::array<std::span<float>, 3> value, gradient;  // by SelfRoutedParameters::kNames
  std::array<std::span<std::uint16_t>, 3> operand;
  std::array<std::span<float>, 3> threshold;  // as given, by SelfRoutedVector
  std::span<cuda::Count> counts;              // inputs, routed, kept

  cuda::Threshold threshold_of(SelfRoutedVector which) const;
};

/// Hybrid<Bfloat16> on a GPU: the same contracts, dense and self-routed layers. All weights and
/// activations are in device memory; work is queued on one stream and nothing waits.
class CudaHybrid {
 public:
  /// Unpacks what stays of the checkpoint to the current device; what learns is taken over by
  /// put(). Without `learns` all layers must be dense. Throws InputError for a layer of another
  /// kind, FormatError for NaN or infinite weights, DeviceError. All borrowed.
  CudaHybrid(const models::Checkpoint& checkpoint, Hybrid<Bfloat16>* learns, bool recompute,
             CudaScratch& scratch, cuda::Blas& blas, const cuda::Stream& stream);

  /// The host's parameters and thresholds; parameters back, once the stream was synchronised.
  void put();
  void fetch();
  /// Takes parameters over after they changed.
  void refresh();

  /// The final normed hidden states of whole windows, [tokens, d_model], bfloat16.
  void hidden(std::span<const std::int32_t> tokens, std::uint16_t* out);

  /// Adds Σ KL from the teacher's hidden states to *kl; and, as Hybrid::gradients(), gradients.
  void divergence(std::span<const std::int32_t> tokens, const std::uint16_t* teacher, double* kl);
  void gradients(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                 std::int64_t n_step, double* kl);

  std::vector<CudaSelfRouted>& converted() { return converted_; }
  std::span<cuda::Count> counts() const { return counts_; }  // of all of them: 3 each
  const models::ModelConfig& config() const { return config_; }

 private:
  void check_layers(const models::Checkpoint& checkpoint, Hybrid<Bfloat16>* learns);
  void take_memory();
  std::int64_t first_converted() const;
  CudaTape& tape(std::size_t layer);
  CudaMlp mlp_of(std::size_t layer, bool counts) const;
  Matrix stream(std::int64_t rows) const { return view(s_.r, rows, config_.d_model); }

  void run_layers(std::int64_t rows, bool keep);
  void run_layer(std::size_t layer, CudaTape& tape, std::int64_t rows, bool counts);
  void mlp_backward(std::size_t layer, CudaTape& tape, std::int64_t rows, bool need_dr);
  void attention_backward(std::size_t layer, CudaTape& tape, ConstMatrix r_in, std::int64_t rows);
  void head(std::int64_t rows, const std::uint16_t* teacher, double unit, bool back, double* kl);

  models::ModelConfig config_;
  CudaScratch& s_;
  cuda::Blas& blas_;
  const cuda::Stream& stream_;
  bool recompute_, learns_;
  CudaDecoder frozen_;                                    // all that does not learn
  std::vector<std::optional<std::size_t>> converted_at_;  // [n_layers]
  std::vector<CudaSelfRouted> converted_;
  std::span<cuda::Count> counts_;
  std::vector<CudaTape> tapes_;           // [n_layers] or none
  std::vector<std::span<float>> inputs_;  // [n_layers] the stream before each layer that learns
  std::unique_ptr<cuda::Arena> arena_;
};

}  // namespace moesaic::converter
