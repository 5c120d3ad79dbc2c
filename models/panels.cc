#include "models/panels.h"

#include <map>
#include <utility>
#include <vector>

#include "kernels/panels.h"

namespace moesaic::models {
namespace {

// Every matrix of the checkpoint that is multiplied with as a whole.
template <class Fn>
void for_each_matrix(Checkpoint& checkpoint, Fn&& fn) {
  fn(checkpoint.head);
  for (LayerWeights& layer : checkpoint.layers) {
    for (WeightView* w : {&layer.w_q, &layer.w_k, &layer.w_v, &layer.w_o}) fn(*w);
    if (auto* dense = std::get_if<DenseMlp>(&layer.mlp)) {
      for (WeightView* w : {&dense->w_gate, &dense->w_up, &dense->w_down}) fn(*w);
    }
  }
}

}  // namespace

std::shared_ptr<const Checkpoint> with_panels(const Checkpoint& checkpoint, ThreadPool& pool) {
  auto result = std::make_shared<Checkpoint>(checkpoint);
  std::size_t total = 0;
  for_each_matrix(*result, [&](const WeightView& w) {
    if (kernels::has_panels(w.dtype, w.cols)) {
      total += static_cast<std::size_t>(kernels::panel_bytes(w));
    }
  });
  auto buffer = std::make_shared<HugeBuffer>(total);
  std::size_t used = 0;
  for_each_matrix(*result, [&](WeightView& w) {
    if (!kernels::has_panels(w.dtype, w.cols)) return;
    std::byte* to = buffer->data() + used;
    used += static_cast<std::size_t>(kernels::panel_bytes(w));
    const std::int64_t n = (w.rows + kernels::kPanelRows - 1) / kernels::kPanelRows;
    pool.run([&](int thread) { kernels::pack_panels(w, split(n, pool.n_threads(), thread), to); });
    w.panels = to;
  });
  result->panels = std::move(buffer);
  return result;
}

}  // namespace moesaic::models
