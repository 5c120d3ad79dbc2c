#include "models/architecture.h"

#include <array>

namespace moesaic::models {
namespace {

constexpr std::array kArchitectures = {
    Architecture{.name = "llama"},
    // Norm weights of a Gemma GGUF include the 1 that the checkpoint's own code adds.
    Architecture{.name = "gemma3",
                 .phi = kernels::Activation::GeluTanh,
                 .rope_style = kernels::RopeStyle::Halves,
                 .scaled_embedding = true,
                 .rope_base = 1000000,
                 .rope_base_local = 10000,
                 .window_pattern = 6,
                 .layer = {.q_norm = "attn_q_norm.weight",
                           .k_norm = "attn_k_norm.weight",
                           .post_attn_norm = "post_attention_norm.weight",
                           .post_mlp_norm = "post_ffw_norm.weight"}},
};

}  // namespace

std::span<const Architecture> architectures() { return kArchitectures; }

const Architecture* find_architecture(std::string_view name) {
  for (const Architecture& a : kArchitectures) {
    if (a.name == name) return &a;
  }
  return nullptr;
}

}  // namespace moesaic::models
