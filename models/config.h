#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "kernels/activation.h"
#include "kernels/rope.h"
#include "models/gguf.h"

namespace moesaic::models {

/// Hyperparameters of a decoder, in our vocabulary; translated from a file's names in one place
/// (config.cc).
struct ModelConfig {
  std::string architecture;  // "llama", "gemma3"
  std::string name;          // general.name
  int n_layers = 0;
  std::int64_t d_model = 0;
  std::int64_t d_ff = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  std::int64_t vocab_size = 0;
  std::int64_t context_length = 0;
  float norm_eps = 0;
  float attention_scale = 0;  // 1/√head_dim unless the file says otherwise
  float embedding_scale = 1;  // √d_model for Gemma
  kernels::Activation phi = kernels::Activation::Silu;
  kernels::RopeStyle rope_style = kernels::RopeStyle::Interleaved;
  bool qk_norm = false;  // RMSNorm on each head of q and k
  bool post_norms =
      false;  // RMSNorm on the outputs of attention and MLP, before the residual addition

  /// What differs between layers.
  struct Layer {
    double rope_base = 10000;
    std::int64_t window = 0;  // sliding-window length in positions; 0: global
  };
  std::vector<Layer> layers;  // [n_layers]

  engine::DecoderShape shape() const;
};

/// Reads and checks the configuration. Throws FormatError: unknown architecture (lists the known
/// ones), missing key, value out of range.
ModelConfig read_config(const GgufFile& file);

}  // namespace moesaic::models
