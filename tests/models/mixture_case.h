#pragma once

#include <cmath>
#include <cstdint>

#include "models/mixture_file.h"
#include "tests/kernels/packed.h"

namespace moesaic::models {

inline AlignedBuffer<std::byte> random_rows(DType dtype, std::int64_t rows, std::int64_t cols,
                                            unsigned seed) {
  const Packed packed(dtype, rows, cols, seed, 0.2f);
  AlignedBuffer<std::byte> bytes(static_cast<std::size_t>(packed.view().bytes()));
  std::copy_n(packed.view().data, bytes.size(), bytes.data());
  return bytes;
}

inline AlignedBuffer<float> counting_floats(std::int64_t n, float first) {
  AlignedBuffer<float> b(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = first + 0.01f * static_cast<float>(i);
  return b;
}

/// A layer with 3 shared neurons and 9 experts, of which 2 run.
inline PackedMixture packed_mixture(const kernels::MixtureKind& kind, std::int64_t block = 1,
                                    std::int64_t d_model = 64, bool extras = true) {
  PackedMixture p;
  p.kind = kind;
  p.block = block;
  p.n_active = 2;
  p.d_model = d_model;
  p.n_shared = extras ? 3 : 0;
  p.n_experts = 9;
  p.router_rank = kind.router == kernels::RouterKind::FullRank ? d_model : 32;
  p.bypass_rank = extras ? 32 : 0;
  p.expert_dtype = DType::Q4_1;
  p.router_dtype = DType::Q8_0;
  const std::int64_t c = kernels::rows_per_neuron(kind.expert);
  const std::int64_t n_scores = kind.router == kernels::RouterKind::ProductKey ? 6 : 9;
  p.shared = random_rows(p.expert_dtype, c * p.n_shared, d_model, 1);
  p.experts = random_rows(p.expert_dtype, c * block * p.n_experts, d_model, 2);
  p.router_v = random_rows(p.router_dtype, p.router_v_rows(), d_model, 3);
  p.router_u = random_rows(p.router_dtype, n_scores, p.router_rank, 4);
  p.bypass_q = random_rows(p.router_dtype, p.bypass_rank, d_model, 5);
  p.bypass_p = random_rows(p.router_dtype, p.bypass_rank > 0 ? d_model : 0, p.bypass_rank, 6);
  if (kind.expert == kernels::ExpertKind::Gelu) {
    p.shared_bias = counting_floats(p.n_shared, 1);
    p.expert_bias = counting_floats(p.n_experts * block, 2);
  }
  if (extras) p.expert_mean = counting_floats(p.n_experts * block, 3);
  p.router_bias = counting_floats(n_scores, 4);
  p.bias = counting_floats(d_model, 5);
  return p;
}

}  // namespace moesaic::models
