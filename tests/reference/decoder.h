#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace moesaic::reference {

/// A decoder in obvious loops and double precision, without cache: the oracle of the transformer.
/// All matrices row-major, as in models/transformer.h.
struct Decoder {
  std::int64_t d_model = 0, d_ff = 0, vocab_size = 0;
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  double norm_eps = 0, attention_scale = 0, embedding_scale = 1;
  bool interleaved_rope = true;
  bool gelu = false;  // tanh form; otherwise SiLU

  /// A secret mixture of experts in place of the MLP: the formula of kernels/secret_moe.h.
  struct Moe {
    std::int64_t n_active = 0;
    std::vector<double> shared, experts;  // [n, 3, d_model]
    std::vector<double> mean;             // [n_experts]
    std::vector<double> router_v;         // [rank, d_model]
    std::vector<double> router_u;         // [n_experts, rank]
    std::vector<double> router_bias;      // [n_experts]
    std::vector<double> bypass_q;         // [q, d_model]
    std::vector<double> bypass_p;         // [d_model, q]
    std::vector<double> bias;             // [d_model]
  };
  struct Layer {
    std::vector<double> attn_norm, w_q, w_k, w_v, w_o, q_norm, k_norm, post_attn_norm;
    std::vector<double> mlp_norm, w_gate, w_up, w_down, post_mlp_norm;
    double rope_base = 10000;
    std::int64_t window = 0;
    std::optional<Moe> moe;
  };
  std::vector<Layer> layers;
  std::vector<double> embedding, output_norm, head;

  /// Logits [ids.size()][vocab_size] of one sequence.
  std::vector<std::vector<double>> logits(const std::vector<std::int32_t>& ids) const;

  /// The MLP (or its mixture) of one token's normed input. `selected` receives the expert ids.
  std::vector<double> mlp(const Layer& layer, const std::vector<double>& x,
                          std::vector<std::int32_t>* selected = nullptr) const;
};

}  // namespace moesaic::reference
