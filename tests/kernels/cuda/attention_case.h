#pragma once

#include <algorithm>

#include "kernels/cuda/attention.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic::cuda {

struct AttentionCase {
  int n_heads = 4, n_kv_heads = 2, head_dim = 32;
  std::int64_t window = 0;
  std::int64_t capacity = 40;
  std::vector<std::int32_t> slots = {0};
  std::vector<std::int32_t> positions = {7};
  float scale = 0.2f;
};

/// Random queries, and a cache of random keys and values, on the host and on the device. There each
/// page is memory of its own, of two layers, and only keys at and before each token's position are
/// written: reading any other is found.
class AttentionOperands {
 public:
  AttentionOperands(const AttentionCase& c, const Stream& stream)
      : case_(c),
        n_slots_(c.slots.empty() ? 1 : *std::max_element(c.slots.begin(), c.slots.end()) + 1),
        keys(size(n_slots_ * c.capacity * row())),
        values(keys.size()),
        queries(normal_values(size(n_tokens() * cols()), 9)),
        pages_per_slot_((c.capacity + kKvPage - 1) / kKvPage),
        device_q_(queries, n_tokens(), cols(), stream),
        device_slots_(on_device(c.slots, stream)),
        device_positions_(on_device(c.positions, stream)) {
    std::vector<float*> table(size(n_slots_ * pages_per_slot_), nullptr);
    for (std::int64_t s = 0; s < n_slots_; ++s) {
      longest_ = std::max(longest_, length_of(s));
      for (std::int64_t p = 0; p * kKvPage < length_of(s); ++p) {
        device_pages_.emplace_back(size(4 * kKvPage * row()));
        table[size(s * pages_per_slot_ + p)] = device_pages_.back().data();
      }
    }
    device_table_ = on_device(table, stream);
    for (std::int64_t s = 0; s < n_slots_; ++s) fill_slot(s, stream);
  }

  std::int64_t n_tokens() const { return static_cast<std::int64_t>(case_.slots.size()); }
  std::int64_t row() const { return std::int64_t{case_.n_kv_heads} * case_.head_dim; }
  std::int64_t cols() const { return std::int64_t{case_.n_heads} * case_.head_dim; }
  AttentionShape shape() const {
    return {case_.n_heads, case_.scale, case_.window, std::max(longest_, case_.capacity)};
  }
  ConstMatrix q() const { return device_q_.view(); }
  TokenPlaces places() const { return {device_slots_.data(), device_positions_.data()}; }
  PagedKv cache() const {  // the second layer
    return {device_table_.data(), pages_per_slot_,  2 * kKvPage * row(),
            3 * kKvPage * row(),  case_.n_kv_heads, case_.head_dim};
  }

  /// Of the host's operands, which a test may round first.
  std::vector<double> expected() {
    return reference::attention(
        {queries.data(), n_tokens(), cols()}, {case_.slots, case_.positions},
        {keys.data(), values.data(), n_slots_, case_.capacity, case_.n_kv_heads, case_.head_dim},
        case_.n_heads, case_.scale, case_.window);
  }

 private:
  std::int64_t length_of(std::int64_t s) const {
    std::int64_t length = 0;
    for (std::size_t t = 0; t < case_.slots.size(); ++t) {
      if (case_.slots[t] == s) length = std::max<std::int64_t>(length, case_.positions[t] + 1);
    }
    return length;
  }
  void fill_slot(std::int64_t s, const Stream& stream) {
    const std::int64_t length = length_of(s);
    const auto k = normal_values(size(length * row()), static_cast<unsigned>(3 * s + 1));
    const auto v = normal_values(size(length * row()), static_cast<unsigned>(3 * s + 2));
    std::copy(k.begin(), k.end(), keys.begin() + s * case_.capacity * row());
    std::copy(v.begin(), v.end(), values.begin() + s * case_.capacity * row());
    std::vector<std::int32_t> all(size(length)), slot(size(length), static_cast<std::int32_t>(s));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int32_t>(i);
    const auto device_all = on_device(all, stream), device_slot = on_device(slot, stream);
    const DeviceMatrix dk(k, length, row(), stream), dv(v, length, row(), stream);
    store_kv(dk.view(), dv.view(), {device_slot.data(), device_all.data()}, cache(), stream);
    stream.synchronize();
  }

  AttentionCase case_;
  std::int64_t n_slots_;
  std::int64_t longest_ = 1;

 public:
  std::vector<float> keys, values;  // [n_slots, capacity, n_kv_heads · head_dim]
  std::vector<float> queries;       // [n_tokens, n_heads · head_dim]

 private:
  std::int64_t pages_per_slot_;
  std::vector<DeviceBuffer<float>> device_pages_;
  DeviceBuffer<float*> device_table_;
  DeviceMatrix device_q_;
  DeviceBuffer<std::int32_t> device_slots_, device_positions_;
};

}  // namespace moesaic::cuda
