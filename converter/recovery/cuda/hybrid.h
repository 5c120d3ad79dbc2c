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

/// Tensors of a secret-MoE layer, by MoeParameters::kNames.
enum MoeTensor : std::size_t {
  kMoeGate,
  kMoeUp,
  kMoeDown,
  kMoeQ,
  kMoeP,
  kMoeBias,
  kRouterV,
  kRouterU,
  kRouterBias
};

/// A tensor under training, and as an operand of products where it is one.
struct CudaTensor {
  std::span<float> value, gradient;
  std::span<std::uint16_t> operand;
};

/// A converted layer under training.
struct CudaConverted {
  Converted<Bfloat16>* host = nullptr;  // its factors and weights of losses hold here, too
  std::vector<CudaTensor> tensors;      // by kNames of its form's parameters
  // Of self-routed layers: thresholds as given, by SelfRoutedVector; inputs, routed, kept.
  std::array<std::span<float>, 3> threshold;
  std::span<cuda::Count> counts;
  // Of secret-MoE layers: μ and ‖w_down,i‖ [n_neurons].
  std::span<float> mean, norm;
  std::span<double> auxiliary;  // [1] its router's regression loss, added up

  cuda::Threshold threshold_of(SelfRoutedVector which) const;
};

/// Hybrid<Bfloat16> on a GPU: the same contracts. All weights and activations are in device memory;
/// work is queued on one stream and nothing waits.
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

  /// Adds Σ KL from the teacher's hidden states to *kl; and, as Hybrid::gradients(), gradients and
  /// each router's loss.
  void divergence(std::span<const std::int32_t> tokens, const std::uint16_t* teacher, double* kl);
  void gradients(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                 std::int64_t n_step, double* kl);

  void clear_gradients();

  std::vector<CudaConverted>& converted() { return converted_; }
  std::span<cuda::Count> counts() const { return counts_; }   // of all of them: 3 each
  std::span<double> auxiliary() const { return auxiliary_; }  // 1 each
  const models::ModelConfig& config() const { return config_; }

 private:
  void check_layers(const models::Checkpoint& checkpoint, Hybrid<Bfloat16>* learns);
  void take_memory();
  void take_memory(DeviceParts& take, CudaConverted& own);
  std::int64_t first_converted() const;
  CudaTape& tape(std::size_t layer);
  CudaMlp mlp_of(std::size_t layer, bool counts) const;
  CudaConverted* moe_of(std::size_t layer);  // or null
  Matrix stream(std::int64_t rows) const { return view(s_.r, rows, config_.d_model); }

  void run_layers(std::int64_t rows, bool keep);
  void run_layer(std::size_t layer, CudaTape& tape, std::int64_t rows, bool counts);
  void mlp_backward(std::size_t layer, CudaTape& tape, std::int64_t rows, std::int64_t n_step,
                    bool need_dr);
  void gated_backward(std::size_t layer, CudaTape& tape, ConstMatrix dy, Matrix dx);
  void moe_forward(const CudaConverted& own, CudaTape& tape, Matrix y, bool accumulate);
  void moe_backward(CudaConverted& own, CudaTape& tape, ConstMatrix dy, std::int64_t n_step,
                    Matrix dx);
  void attention_backward(std::size_t layer, CudaTape& tape, ConstMatrix r_in, std::int64_t rows);
  void head(std::int64_t rows, const std::uint16_t* teacher, double unit, bool back, double* kl);

  models::ModelConfig config_;
  CudaScratch& s_;
  cuda::Blas& blas_;
  const cuda::Stream& stream_;
  bool recompute_, learns_;
  CudaDecoder frozen_;                                    // all that does not learn
  std::vector<std::optional<std::size_t>> converted_at_;  // [n_layers]
  std::vector<CudaConverted> converted_;
  std::span<cuda::Count> counts_;
  std::span<double> auxiliary_;
  std::vector<CudaTape> tapes_;           // [n_layers] or none
  std::vector<std::span<float>> inputs_;  // [n_layers] the stream before each layer that learns
  std::unique_ptr<cuda::Arena> arena_;
};

}  // namespace moesaic::converter
