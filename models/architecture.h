#pragma once

#include <span>
#include <string>
#include <string_view>

#include "kernels/activation.h"
#include "kernels/rope.h"

namespace moesaic::models {

/// What a checkpoint's architecture calls the tensors of a layer ("blk.N." in front). Empty: the
/// architecture has no such tensor.
struct LayerTensorNames {
  std::string_view attn_norm = "attn_norm.weight";
  std::string_view w_q = "attn_q.weight";
  std::string_view w_k = "attn_k.weight";
  std::string_view w_v = "attn_v.weight";
  std::string_view w_o = "attn_output.weight";
  std::string_view q_norm = {};
  std::string_view k_norm = {};
  std::string_view post_attn_norm = {};
  std::string_view mlp_norm = "ffn_norm.weight";
  std::string_view w_gate = "ffn_gate.weight";
  std::string_view w_up = "ffn_up.weight";
  std::string_view w_down = "ffn_down.weight";
  std::string_view post_mlp_norm = {};
};

/// One decoder family: what of it is fixed by the name alone. The rest stands in the metadata.
struct Architecture {
  std::string_view name;
  kernels::Activation phi = kernels::Activation::Silu;
  kernels::RopeStyle rope_style = kernels::RopeStyle::Interleaved;
  bool scaled_embedding = false;  // embedding times √d_model
  double rope_base = 10000;       // where the file does not say
  double rope_base_local = 0;     // of sliding-window layers; 0: the same as of the others
  int window_pattern = 1;  // every n-th layer is global, the others slide; 1: all slide if any does
  LayerTensorNames layer = {};
};

inline constexpr std::string_view kEmbeddingName = "token_embd.weight";
inline constexpr std::string_view kOutputNormName = "output_norm.weight";
inline constexpr std::string_view kHeadName = "output.weight";  // absent: tied to the embedding

/// All that are known.
std::span<const Architecture> architectures();

/// The architecture with this name, or nullptr.
const Architecture* find_architecture(std::string_view name);

}  // namespace moesaic::models
