#include "models/panels.h"

#include <utility>
#include <variant>

#include "kernels/packing.h"

namespace moesaic::models {
namespace {

// Packs everything that is multiplied with as a whole, or counts its bytes.
void pack_all(Checkpoint& checkpoint, ThreadPool& pool, kernels::Pieces& pieces) {
  for (LayerWeights& layer : checkpoint.layers) {
    for (WeightView* w : {&layer.w_q, &layer.w_k, &layer.w_v, &layer.w_o}) {
      kernels::pack_matrix(*w, pool, pieces);
    }
    if (auto* dense = std::get_if<DenseMlp>(&layer.mlp)) {
      for (WeightView* w : {&dense->w_gate, &dense->w_up, &dense->w_down}) {
        kernels::pack_matrix(*w, pool, pieces);
      }
    } else if (auto* routed = std::get_if<kernels::SelfRoutedView>(&layer.mlp)) {
      kernels::pack_self_routed(*routed, pool, pieces);
    } else if (auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp)) {
      kernels::pack_secret_moe(*moe, pool, pieces);
    }
  }
  kernels::pack_matrix(checkpoint.head, pool, pieces);
}

}  // namespace

std::shared_ptr<const Checkpoint> with_panels(const Checkpoint& checkpoint, ThreadPool& pool) {
  Checkpoint counted = checkpoint;
  kernels::Pieces count(nullptr);
  pack_all(counted, pool, count);
  auto buffer = std::make_shared<HugeBuffer>(count.used());
  kernels::Pieces pieces(buffer->data());
  auto result = std::make_shared<Checkpoint>(checkpoint);
  pack_all(*result, pool, pieces);
  result->panels = std::move(buffer);
  result->file->drop_pages();
  return result;
}

}  // namespace moesaic::models
