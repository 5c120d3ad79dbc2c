#include "kernels/packing.h"

#include <cstring>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/columns.h"
#include "kernels/neurons.h"
#include "kernels/panels.h"
#include "kernels/quant.h"

namespace moesaic::kernels {

void pack_matrix(WeightView& w, ThreadPool& pool, Pieces& pieces) {
  if (!has_panels(w.dtype, w.cols)) return;
  std::byte* to = pieces.take(panel_bytes(w));
  if (pieces.counting()) return;
  pool.run([&](int thread) { pack_panels(w, split(n_panels(w), pool.n_threads(), thread), to); });
  w.panels = to;
}

namespace {

const std::byte* all_neurons(const WeightView& rows, ThreadPool& pool, Pieces& pieces) {
  const std::int64_t n = rows.rows / 3;
  std::byte* to = pieces.take(n * neuron_layout(rows.dtype, rows.cols).neuron_bytes());
  if (pieces.counting()) return nullptr;
  pool.run([&](int thread) { pack_neurons(rows, split(n, pool.n_threads(), thread), to); });
  return to;
}

// Rows `part` of the shared neurons and the experts, one after the other: panels alone.
WeightView gathered_panels(const SecretMoeView& moe, std::int64_t part, ThreadPool& pool,
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
  pack_matrix(w, pool, pieces);
  w.data = nullptr;
  return w;
}

// The down rows as columns, in bfloat16: panels alone.
WeightView down_panels(const SecretMoeView& moe, ThreadPool& pool, Pieces& pieces) {
  const std::int64_t n = moe.n_shared() + moe.n_experts();
  const auto d_model = static_cast<std::size_t>(moe.d_model());
  AlignedBuffer<std::uint16_t> columns(pieces.counting() ? 0
                                                         : d_model * static_cast<std::size_t>(n));
  if (!pieces.counting()) {
    std::vector<std::uint16_t> row(d_model);
    for (std::int64_t i = 0; i < n; ++i) {
      const bool shared = i < moe.n_shared();
      const WeightView& from = shared ? moe.shared : moe.experts;
      dequantize_row_bf16(from.dtype, from.row(3 * (shared ? i : i - moe.n_shared()) + 2), row);
      for (std::size_t d = 0; d < d_model; ++d) {
        columns[d * static_cast<std::size_t>(n) + static_cast<std::size_t>(i)] = row[d];
      }
    }
  }
  WeightView w{.data = reinterpret_cast<const std::byte*>(columns.data()),
               .dtype = DType::BF16,
               .rows = moe.d_model(),
               .cols = n};
  pack_matrix(w, pool, pieces);
  w.data = nullptr;
  return w;
}

bool can_pack(const SecretMoeView& moe) {
  const auto panels = [](const WeightView& w) {
    return w.rows == 0 || has_panels(w.dtype, w.cols);
  };
  return (moe.n_shared() == 0 || moe.shared.dtype == moe.experts.dtype) &&
         has_neurons(moe.experts.dtype, moe.d_model()) &&
         has_panels(moe.experts.dtype, moe.d_model()) &&
         has_panels(DType::BF16, moe.n_shared() + moe.n_experts()) && panels(moe.router_v) &&
         panels(moe.router_u) && panels(moe.bypass_q) && panels(moe.bypass_p);
}

}  // namespace

void pack_secret_moe(SecretMoeView& moe, ThreadPool& pool, Pieces& pieces) {
  if (!can_pack(moe)) return;
  for (WeightView* w : {&moe.router_v, &moe.router_u, &moe.bypass_q, &moe.bypass_p}) {
    if (w->rows > 0) pack_matrix(*w, pool, pieces);
  }
  if (moe.n_shared() > 0) moe.shared_neurons = all_neurons(moe.shared, pool, pieces);
  moe.expert_neurons = all_neurons(moe.experts, pool, pieces);
  moe.all_gate = gathered_panels(moe, 0, pool, pieces);
  moe.all_up = gathered_panels(moe, 1, pool, pieces);
  moe.all_down = down_panels(moe, pool, pieces);
}

namespace {

const std::byte* all_columns(const WeightView& w, ThreadPool& pool, Pieces& pieces) {
  std::byte* to = pieces.take(columns_bytes(w));
  if (pieces.counting()) return nullptr;
  pool.run([&](int thread) { pack_columns(w, split(w.cols / 32, pool.n_threads(), thread), to); });
  return to;
}

const std::byte* all_in_rows(const WeightView& w, ThreadPool& pool, Pieces& pieces) {
  std::byte* to = pieces.take(w.rows * neuron_layout(w.dtype, w.cols).single_row_bytes());
  if (pieces.counting()) return nullptr;
  pool.run([&](int thread) { pack_in_rows(w, split(w.rows, pool.n_threads(), thread), to); });
  return to;
}

}  // namespace

void pack_self_routed(SelfRoutedView& layer, ThreadPool& pool, Pieces& pieces) {
  for (WeightView* w : {&layer.w_gate, &layer.w_up, &layer.w_down}) pack_matrix(*w, pool, pieces);
  const auto columns = [](const WeightView& w) { return has_columns(w.dtype, w.rows, w.cols); };
  const bool up =
      layer.up_by_input ? columns(layer.w_up) : has_neurons(layer.w_up.dtype, layer.d_model());
  if (!columns(layer.w_gate) || !up || !columns(layer.w_down)) return;
  layer.gate_columns = all_columns(layer.w_gate, pool, pieces);
  layer.up_parts = (layer.up_by_input ? all_columns : all_in_rows)(layer.w_up, pool, pieces);
  layer.down_columns = all_columns(layer.w_down, pool, pieces);
}

}  // namespace moesaic::kernels
