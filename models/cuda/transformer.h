#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/base/arena.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/base/graph.h"
#include "kernels/cuda/base/pinned_buffer.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/sample.h"
#include "models/cuda/kv_cache.h"
#include "models/cuda/weights.h"

namespace moesaic::models {

/// Transformer on a GPU: weights, cache and activations in device memory, float32 activations and
/// sums. A batch that wants logits of all its rows, as decode does, runs as one graph, which is
/// captured when its shape first comes; the host waits once, for the logits, or for a token of each
/// row that was drawn from them. Other batches are queued kernel by kernel.
///
/// Up to 64 rows all is float32: rows beyond 8 read the weights again for each 8. Larger batches,
/// prompts that is, go through tensor cores, operands rounded to bfloat16: dense products and
/// self-routed layers through cuBLAS, which is loaded with the first of them, attention, and
/// secret-MoE layers. A row's result depends on how many others come with it only as far as that.
class CudaTransformer : public engine::Decoder {
 public:
  /// Copies the checkpoint's weights to GPU `device`. Throws DeviceError; ShapeError for d_model,
  /// d_ff or head_dim that are no multiple of 4: rows begin at multiples of 16 bytes.
  CudaTransformer(std::shared_ptr<const Checkpoint> checkpoint, int device);

  // engine::Decoder
  engine::DecoderShape shape() const override { return config().shape(); }
  std::unique_ptr<engine::KvCache> make_cache(std::int64_t n_slots,
                                              std::int64_t capacity) const override;
  void forward(const engine::Batch& batch, engine::KvCache& cache, Matrix logits) override;
  bool draws() const override { return config().vocab_size <= cuda::kMaxSampleVocab; }
  void forward_and_draw(const engine::Batch& batch, engine::KvCache& cache,
                        std::span<const kernels::Draw> draws, std::span<std::int32_t> ids) override;

 private:
  /// What a captured graph serves: it holds the addresses of one cache, attention that sees
  /// positions below max_positions, and an end that draws or does not.
  struct PassShape {
    std::int64_t n_rows = 0;
    std::int64_t n_outputs = 0;
    std::int64_t max_positions = 0;
    float* const* cache = nullptr;
    std::int64_t pages_per_slot = 0;
    bool draws = false;
    auto operator<=>(const PassShape&) const = default;
  };

  /// Memory that passes use again: enough for any up to n_rows, n_outputs and max_positions.
  struct Buffers {
    Buffers() = default;
    Buffers(const ModelConfig& config, const CudaWeights& weights, std::int64_t n_rows,
            std::int64_t n_outputs, std::int64_t max_positions, const cuda::Stream& stream);

    std::int64_t n_rows = 0, n_outputs = 0, max_positions = 0;
    std::shared_ptr<cuda::Arena> arena;
    std::span<float> r, n, t, wanted;  // [n_rows, d_model]
    std::span<float> q, mixed;         // [n_rows, n_heads · head_dim]
    std::span<float> k, v;             // [n_rows, n_kv_heads · head_dim]
    std::span<float> gate, up;         // [n_rows, d_ff]
    std::span<float> logits;           // [n_outputs, vocab_size]
    std::span<std::int32_t> rows;      // tokens, slots, positions: [3, n_rows]
    std::span<std::int32_t> selected;  // of one layer: [rows at once, n_active]
    std::span<kernels::Draw> draws;    // [n_outputs]
    std::span<std::int32_t> ids;       // [n_outputs]
    // Workspaces.
    std::span<std::byte> attention, gemm, mixture, moe, moe_batch, self_routed, sample;
    cuda::PinnedBuffer<std::int32_t> host_rows;
    cuda::PinnedBuffer<float> host_logits;
    cuda::PinnedBuffer<kernels::Draw> host_draws;
    cuda::PinnedBuffer<std::int32_t> host_ids;
  };

  const ModelConfig& config() const { return checkpoint_->config; }
  void reserve(const PassShape& pass);
  // Checks and runs a batch. Its logits are then in host_logits or, if it draws as host_draws says,
  // its tokens in host_ids.
  void run(const engine::Batch& batch, engine::KvCache& cache,
           std::span<const kernels::Draw> draws);
  // The whole pass, from host_rows and host_draws to what run() leaves.
  void queue(const PassShape& pass, std::span<const std::int32_t> outputs,
             const CudaKvCache& cache);
  void queue_products(std::span<const cuda::Product> products);
  void queue_attention(int layer, const PassShape& pass, const cuda::PagedKv& cache);
  void queue_mlp(int layer, std::int64_t n_rows);

  std::shared_ptr<const Checkpoint> checkpoint_;
  cuda::Stream stream_;
  CudaWeights weights_;
  std::optional<cuda::Blas> blas_;  // once a batch has needed it
  Buffers buffers_;
  std::map<PassShape, cuda::Graph> graphs_;
};

}  // namespace moesaic::models
