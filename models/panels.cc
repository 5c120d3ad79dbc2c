#include "models/panels.h"

#include <cstring>
#include <utility>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/neurons.h"
#include "kernels/panels.h"
#include "kernels/quant.h"

namespace moesaic::models {
namespace {

constexpr std::size_t kAlign = 64;

// Hands out the pieces of one buffer; on a first pass, without memory, it only counts.
class Pieces {
 public:
  explicit Pieces(std::byte* data) : data_(data) {}
  std::byte* take(std::int64_t bytes) {
    std::byte* p = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (static_cast<std::size_t>(bytes) + kAlign - 1) / kAlign * kAlign;
    return p;
  }
  std::size_t used() const { return used_; }
  bool counting() const { return data_ == nullptr; }

 private:
  std::byte* data_;
  std::size_t used_ = 0;
};

void add_panels(WeightView& w, ThreadPool& pool, Pieces& pieces) {
  if (!kernels::has_panels(w.dtype, w.cols)) return;
  std::byte* to = pieces.take(kernels::panel_bytes(w));
  if (pieces.counting()) return;
  const std::int64_t n = (w.rows + kernels::kPanelRows - 1) / kernels::kPanelRows;
  pool.run([&](int thread) { kernels::pack_panels(w, split(n, pool.n_threads(), thread), to); });
  w.panels = to;
}

const std::byte* pack_neurons(const WeightView& rows, ThreadPool& pool, Pieces& pieces) {
  const std::int64_t n = rows.rows / 3;
  std::byte* to = pieces.take(n * kernels::neuron_layout(rows.dtype, rows.cols).neuron_bytes());
  if (pieces.counting()) return nullptr;
  pool.run(
      [&](int thread) { kernels::pack_neurons(rows, split(n, pool.n_threads(), thread), to); });
  return to;
}

// Rows `part` of the shared neurons and the experts, one after the other: panels alone.
WeightView gathered_panels(const kernels::SecretMoeView& moe, std::int64_t part, ThreadPool& pool,
                           Pieces& pieces) {
  const std::int64_t row_bytes = moe.experts.row_bytes();
  const std::int64_t n = moe.n_shared() + moe.n_experts();
  AlignedBuffer<std::byte> rows(pieces.counting() ? 0 : static_cast<std::size_t>(n * row_bytes));
  for (std::int64_t i = 0; i < n && !pieces.counting(); ++i) {
    const bool shared = i < moe.n_shared();
    const std::byte* from =
        shared ? moe.shared.row(3 * i + part) : moe.experts.row(3 * (i - moe.n_shared()) + part);
    std::memcpy(rows.data() + i * row_bytes, from, static_cast<std::size_t>(row_bytes));
  }
  WeightView w{.data = rows.data(), .dtype = moe.experts.dtype, .rows = n, .cols = moe.d_model()};
  add_panels(w, pool, pieces);
  w.data = nullptr;
  return w;
}

// The down rows as columns, in bfloat16: panels alone.
WeightView down_panels(const kernels::SecretMoeView& moe, ThreadPool& pool, Pieces& pieces) {
  const std::int64_t n = moe.n_shared() + moe.n_experts();
  const auto d_model = static_cast<std::size_t>(moe.d_model());
  AlignedBuffer<std::uint16_t> columns(pieces.counting() ? 0
                                                         : d_model * static_cast<std::size_t>(n));
  if (!pieces.counting()) {
    std::vector<std::uint16_t> row(d_model);
    for (std::int64_t i = 0; i < n; ++i) {
      const bool shared = i < moe.n_shared();
      const WeightView& from = shared ? moe.shared : moe.experts;
      kernels::dequantize_row_bf16(from.dtype, from.row(3 * (shared ? i : i - moe.n_shared()) + 2),
                                   row);
      for (std::size_t d = 0; d < d_model; ++d) {
        columns[d * static_cast<std::size_t>(n) + static_cast<std::size_t>(i)] = row[d];
      }
    }
  }
  WeightView w{.data = reinterpret_cast<const std::byte*>(columns.data()),
               .dtype = DType::BF16,
               .rows = moe.d_model(),
               .cols = n};
  add_panels(w, pool, pieces);
  w.data = nullptr;
  return w;
}

bool can_pack(const kernels::SecretMoeView& moe) {
  const auto panels = [](const WeightView& w) {
    return w.rows == 0 || kernels::has_panels(w.dtype, w.cols);
  };
  return moe.shared.dtype == moe.experts.dtype &&
         kernels::has_neurons(moe.experts.dtype, moe.d_model()) &&
         kernels::has_panels(moe.experts.dtype, moe.d_model()) &&
         kernels::has_panels(DType::BF16, moe.n_shared() + moe.n_experts()) &&
         panels(moe.router_v) && panels(moe.router_u) && panels(moe.bypass_q) &&
         panels(moe.bypass_p);
}

void pack_secret_moe(kernels::SecretMoeView& moe, ThreadPool& pool, Pieces& pieces) {
  if (!can_pack(moe)) return;
  for (WeightView* w : {&moe.router_v, &moe.router_u, &moe.bypass_q, &moe.bypass_p}) {
    if (w->rows > 0) add_panels(*w, pool, pieces);
  }
  moe.shared_neurons = pack_neurons(moe.shared, pool, pieces);
  moe.expert_neurons = pack_neurons(moe.experts, pool, pieces);
  moe.all_gate = gathered_panels(moe, 0, pool, pieces);
  moe.all_up = gathered_panels(moe, 1, pool, pieces);
  moe.all_down = down_panels(moe, pool, pieces);
}

// Packs everything that is multiplied with as a whole, or counts its bytes.
void pack_all(Checkpoint& checkpoint, ThreadPool& pool, Pieces& pieces) {
  for (LayerWeights& layer : checkpoint.layers) {
    for (WeightView* w : {&layer.w_q, &layer.w_k, &layer.w_v, &layer.w_o}) {
      add_panels(*w, pool, pieces);
    }
    if (auto* dense = std::get_if<DenseMlp>(&layer.mlp)) {
      for (WeightView* w : {&dense->w_gate, &dense->w_up, &dense->w_down}) {
        add_panels(*w, pool, pieces);
      }
    } else {
      pack_secret_moe(std::get<kernels::SecretMoeView>(layer.mlp), pool, pieces);
    }
  }
  add_panels(checkpoint.head, pool, pieces);
}

}  // namespace

std::shared_ptr<const Checkpoint> with_panels(const Checkpoint& checkpoint, ThreadPool& pool) {
  Checkpoint counted = checkpoint;
  Pieces count(nullptr);
  pack_all(counted, pool, count);
  auto buffer = std::make_shared<HugeBuffer>(count.used());
  Pieces pieces(buffer->data());
  auto result = std::make_shared<Checkpoint>(checkpoint);
  pack_all(*result, pool, pieces);
  result->panels = std::move(buffer);
  return result;
}

}  // namespace moesaic::models
