#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/self_routed.h"
#include "models/architecture.h"
#include "models/config.h"
#include "models/gguf.h"
#include "models/mlp.h"

namespace moesaic::models {

/// How self-routed layers stand in a GGUF, beside what secret_moe_file.h says. The dense tensors
/// ffn_gate, ffn_up, ffn_down stay under their names, so that any reader of the dense format runs
/// the file as a dense model; besides
///
///   moesaic.layer.kind          "glu+gate", or "glu+input" where nothing is routed by the gate
///   moesaic.layer.input_share   [f32] per layer, means over the calibration text; 1 where the
///   moesaic.layer.gate_share    [f32] layer is of another kind
///   moesaic.layer.hidden_share  [f32]
///
///   blk.N.moe.input_threshold   [d_model] F32
///   blk.N.moe.gate_threshold    [d_ff] F32, absent for "glu+input"
///   blk.N.moe.hidden_threshold  [d_ff] F32
inline constexpr std::string_view kKindGluGate = "glu+gate";
inline constexpr std::string_view kKindGluInput = "glu+input";
inline constexpr std::string_view kKeyInputShare = "moesaic.layer.input_share";
inline constexpr std::string_view kKeyGateShare = "moesaic.layer.gate_share";
inline constexpr std::string_view kKeyHiddenShare = "moesaic.layer.hidden_share";
inline constexpr std::string_view kInputThreshold = "moe.input_threshold";
inline constexpr std::string_view kGateThreshold = "moe.gate_threshold";
inline constexpr std::string_view kHiddenThreshold = "moe.hidden_threshold";

/// The layer around the dense MLP's matrices, or nothing if layer N is of another kind. Throws
/// FormatError for a missing tensor, a shape that does not fit, a threshold that is NaN.
std::optional<kernels::SelfRoutedView> read_self_routed(const GgufFile& file,
                                                        const ModelConfig& config, int layer,
                                                        const DenseMlp& dense);

/// One layer's tensors in memory, packed in their file formats; the view points into them.
struct PackedSelfRouted {
  kernels::Activation phi = kernels::Activation::Silu;
  bool up_by_input = false;
  std::int64_t d_model = 0, d_ff = 0;
  DType gate_dtype = DType::BF16, up_dtype = DType::BF16, down_dtype = DType::BF16;
  AlignedBuffer<std::byte> w_gate, w_up, w_down;
  AlignedBuffer<float> input_threshold, gate_threshold, hidden_threshold;
  float input_share = 1, gate_share = 1, hidden_share = 1;

  kernels::SelfRoutedView view() const;

  /// Its tensors under their names in a file; *this must live as long as they do.
  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> dims;
    std::span<const std::byte> data;
  };
  std::vector<Tensor> tensors(const LayerTensorNames& names, int layer) const;
};

}  // namespace moesaic::models
